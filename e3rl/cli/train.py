"""`e3rl train`: trains a recipe; writes a run directory and a model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e3rl.cli.main import add_setting_arguments
from e3rl.cli.opening import announce_foreign_code, quiet_libraries, read_recipe
from e3rl.cli.recipes import find_recipe, recipe_names
from e3rl.config import Config, read_tables
from e3rl.objectives import left_behind
from e3rl.train.run_directory import continue_or_put_aside

if TYPE_CHECKING:
    from e3rl.cluster.training_worker import Begin
    from e3rl.train.listeners import Listener


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help=f"a TOML file, or one of: {', '.join(recipe_names())}")
    parser.add_argument("--objective", metavar="NAME", help="short for objective.name=NAME")
    parser.add_argument(
        "--address", metavar="RAY", help="short for rollout.address=RAY: the Ray cluster of the workers"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run from its newest checkpoint")
    parser.add_argument(
        "--again", action="store_true", help="continue an unfinished run; move a finished one aside and start again"
    )
    parser.add_argument(
        "--plan", action="store_true", help="only print what it needs and whether it fits; loads no weights"
    )
    parser.add_argument(
        "--device-memory",
        type=float,
        metavar="GIB",
        help="with --plan: memory of another device, a GPU (default: this one)",
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="with --plan: devices that train together (default: train.workers, or 1)"
    )
    add_setting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    named = [f"objective.name={options.objective}"] if options.objective else []
    named += [f"rollout.address={options.address}"] if options.address else []
    config = read_recipe(options, named)
    if _decides():
        for line in left_behind(read_tables(find_recipe(options.recipe)), config.objective):
            print(f"note: {line}", file=sys.stderr)
    on_ray = bool(config.rollout.workers or config.train.workers)
    if on_ray and options.guard and not options.plan:
        return int(options.guard())
    announce_foreign_code(config)
    if options.plan:
        return _plan(config, options.device_memory, options.ranks or max(1, config.train.workers))

    from rich.console import Console

    from e3rl.cluster.training_worker import Begin
    from e3rl.report.display import build_display, closing

    quiet_libraries()
    console = Console()
    display = build_display(console)
    try:
        path, summary = launch(config, Begin(options.resume, options.again), display)
    finally:
        display.close()
    if summary:  # only rank 0 has one
        console.print(closing(path, config, summary))
    return 0


def _decides() -> bool:
    """Whether this is rank 0: it decides and speaks, the others follow."""
    return os.environ.get("RANK", "0") == "0"


def launch(config: Config, begin: Begin, listener: Listener) -> tuple[Path, Mapping[str, Any]]:
    """Train in the processes that the config asks for: ranks on Ray, or this one."""
    from e3rl.cluster.ray_ranks import train_on_ray

    job = partial(train_rank, config)
    return train_on_ray(config, job, begin, listener) if config.train.workers else job(begin, listener)


def train_rank(
    config: Config, begin: Begin, display: Listener, on_stop: Callable[[Callable[[], None]], None] = lambda _: None
) -> tuple[Path, Mapping[str, Any]]:
    """Train as this process's rank, started by any launcher. ``on_stop`` receives the function that requests a stop."""
    resume = continue_or_put_aside(config) if begin.again and _decides() else begin.resume

    from e3rl.plan.fit import require_fit
    from e3rl.report.trackers import ReportListener, build_trackers
    from e3rl.train.trainer import Trainer

    quiet_libraries()
    require_fit(config, int(os.environ.get("WORLD_SIZE", "1")))
    listeners = [display, *build_trackers(config.train.report_to, display.noted), ReportListener(display.noted)]
    display.noted(f"loading {config.model.path} …")
    trainer = Trainer(config, listeners=listeners, resume=resume)
    on_stop(trainer.ask_to_stop)
    return trainer.run_path, trainer.train()


def _plan(config: Config, gib: float | None, ranks: int) -> int:
    from e3rl.models import resolve_device
    from e3rl.plan.fit import changes_that_fit, plan_text
    from e3rl.plan.memory import GIB, device_bytes, make_plan

    quiet_libraries()
    available = device_bytes(config.model) if gib is None else int(gib * GIB)
    elsewhere = gib is not None and config.model.device == "auto"
    on_cpu = not elsewhere and resolve_device(config.model.device).type == "cpu"
    plan = make_plan(config, ranks, on_cpu=on_cpu)
    changes = changes_that_fit(config, plan, available, ranks=ranks, on_cpu=on_cpu)
    print(plan_text(config, plan, available, changes))
    return 0
