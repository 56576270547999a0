"""`e3rl reproduce`: the papers' tables and figures, at the scale that you can afford."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from e3rl.cli.recipes import RESEARCH
from e3rl.errors import UserError

if TYPE_CHECKING:
    from e3rl_reproduce.reproduce import Task

NAMES = "table1 … table8, fig1, fig3 … fig6, erpo-table1, erpo-table2, erpo-fig1 … erpo-fig4, when, settle, confirm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME", help=NAMES)
    parser.add_argument(
        "--scale", choices=("smoke", "lab", "smollm2", "paper"), default="smoke",
        help="smoke: under a minute; lab: the embedded model, hours on two cores; smollm2: a small real model on arithmetic, "
        "hours on two cores; paper: the paper's recipe",
    )  # fmt: skip
    parser.add_argument("--model", metavar="NAME", help="only this one of the scale's models, such as Qwen3-4B")
    parser.add_argument("--plan", action="store_true", help="print what it would need; run nothing")
    parser.add_argument(
        "--rehearse", type=int, metavar="N",
        help="run the first N cells at the sizes of e3rl rehearse: the same processes, killed once and resumed",
    )  # fmt: skip
    parser.add_argument("--report", action="store_true", help="write the pages from existing results; run nothing")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where cells and pages go; default: runs/reproduce/SCALE"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cells that run at the same time (default 1)")
    parser.add_argument(
        "--launcher", default="", metavar="CMD", help="put before each cell's command, such as 'nice -n 19'"
    )
    parser.add_argument(
        "--overlay", action="append", default=[], metavar="RECIPE",
        help="lay it on every recipe, for example topologies/32xh100 for where cells are trained",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, help="start no cell after this many minutes")


def _require_research() -> None:
    missing = [name for name in (RESEARCH, "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"e3rl reproduce needs {' and '.join(missing)}: pip install 'e3rl[reproduce]'")


def run(options: argparse.Namespace) -> int:
    if options.jobs < 1:
        raise UserError("--jobs must be at least 1")
    if options.rehearse is not None and options.rehearse < 1:
        raise UserError("--rehearse must be at least 1: the number of cells")
    _require_research()
    from e3rl_reproduce.reproduce import report, reproduce, show_plan, tasks

    out = options.out or Path("runs/reproduce") / options.scale
    todo = tasks(
        options.names, options.scale, options.overrides, out=out, model=options.model, overlays=options.overlay
    )
    if options.plan:
        print("\n".join(show_plan(todo, out)))
        return 0
    if options.rehearse is not None:
        return _rehearse(options, todo)
    if options.report:
        pages = [report(study, scale, out) for study, scale in todo]
    else:
        pages = reproduce(
            todo,
            out,
            jobs=options.jobs,
            launcher=shlex.split(options.launcher),
            deadline=None if options.minutes is None else time.time() + 60 * options.minutes,
            say=lambda line: print(line, flush=True),
        )
    for page in pages:
        print(page.read_text(encoding="utf-8"))
        print(f"Written: {page}")
    return 0


def _rehearse(options: argparse.Namespace, todo: Sequence[Task]) -> int:
    from e3rl.cli.opening import quiet_libraries
    from e3rl.rehearse.rehearsal import report
    from e3rl_reproduce.reproduce import rehearse_cells

    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="e3rl-rehearsal-") as temporary:
        directory = (options.out or Path(temporary)).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        print(report(rehearse_cells(todo, options.rehearse, directory, lambda text: print(text, flush=True))))
    return 0
