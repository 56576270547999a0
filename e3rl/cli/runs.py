"""Commands on existing runs and evaluations: `e3rl view`, `e3rl doctor`, `e3rl replay` and `e3rl compare`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from e3rl.cli.opening import quiet_libraries
from e3rl.errors import UserError

LOOPBACK = "127.0.0.1"


def view_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--port", type=int, default=8265, help="port to listen on (default 8265)")
    parser.add_argument("--host", default=LOOPBACK, help="address to listen on; other than loopback needs --token")
    parser.add_argument("--token", help="secret that readers must give")


def view(options: argparse.Namespace) -> int:
    """`e3rl view`: the pages of runs, served live."""
    from e3rl.web.access import Access

    access = Access(options.host, options.token)
    for path in options.runs:
        if not (path / "config.toml").is_file():
            raise UserError(f"{path} is no run directory: it holds no config.toml")

    from e3rl.report.server import serve

    serve(options.runs, access, options.port)
    return 0


_SIGNS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", type=Path, help="a run directory; without one, this machine is checked")
    parser.add_argument(
        "--repair", action="store_true", help="cut damaged log lines, put damaged files aside, remove half-written ones"
    )


def doctor(options: argparse.Namespace) -> int:
    """`e3rl doctor`: check this machine, or a run directory, and say what to fix."""
    if options.repair and options.run is None:
        raise UserError("--repair needs a run directory: e3rl doctor RUN --repair")
    if options.run is not None and not options.run.is_dir():
        raise UserError(f"{options.run} is no directory")

    from e3rl.doctor.machine import check_machine
    from e3rl.doctor.run import check_run, repair_run

    findings = []
    for finding in check_machine(Path()) if options.run is None else check_run(options.run):
        print(f"{_SIGNS[finding.kind]}  {finding.subject}: {finding.text}", flush=True)
        findings.append(finding)
    problems = [f for f in findings if f.kind == "problem"]
    if options.repair:
        print(f"put right: {repair_run(options.run, findings)} of {len(problems)}")
        problems = [f for f in problems if f.repair is None]
    elif any(f.repair for f in problems):
        print(f"'e3rl doctor {options.run} --repair' repairs what it can")
    return 1 if problems else 0


def replay_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--step", type=int, help="the skipped step; by default the newest that is kept")
    parser.add_argument(
        "--trust", action="append", default=[], metavar="NAME", help="run this code that the run's config names"
    )


def replay(options: argparse.Namespace) -> int:
    """`e3rl replay`: learn a skipped step again and see where its NaN comes from."""
    from e3rl.train.replay import replay

    quiet_libraries()
    replay(options.run, options.step, print, trusted=options.trust)
    return 0


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, help="directory of an evaluation (e3rl eval … --output DIR)")
    parser.add_argument("b", type=Path, help="directory of another one, on the same problems")
    parser.add_argument("--mode", default="plain", choices=("plain", "erasable"), help="decoding of A (default plain)")
    parser.add_argument("--mode-b", choices=("plain", "erasable"), help="decoding of B; default: as A")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def compare(options: argparse.Namespace) -> int:
    """`e3rl compare`: two evaluations on the same problems, and whether their difference may be chance."""
    from rich.console import Console

    from e3rl.evaluate.compare import compare, comparison_table

    modes = (options.mode, options.mode_b or options.mode)
    found = compare(options.a, options.b, modes)
    if options.json:
        print(json.dumps({name: asdict(row) for name, row in found.items()}, indent=2))
    else:
        Console().print(comparison_table(f"{options.a} ({modes[0]}) minus {options.b} ({modes[1]})", found))
    return 0
