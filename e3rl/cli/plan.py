"""`e3rl plan --simulate`: how long a step takes on any number of GPUs, and what takes it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from e3rl.cli.main import add_setting_arguments
from e3rl.cli.recipes import find_recipe, find_recipes, recipe_names
from e3rl.config import Config, load_config
from e3rl.errors import UserError

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def add_arguments(parser: argparse.ArgumentParser) -> None:

    parser.add_argument("recipe", help=f"a TOML file, or one of: {', '.join(recipe_names())}")
    parser.add_argument("--simulate", action="store_true", help="simulate rollouts and training from 1 to 1,024 GPUs")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS), metavar="N", help="numbers of GPUs")
    parser.add_argument("--parameters", type=float, default=4e9, help="of the model; default: 4e9")
    parser.add_argument(
        "--kv-bytes", type=float, default=147456, help="of a token's keys and values; default: Qwen3-4B's"
    )
    parser.add_argument("--rows", type=int, default=256, help="sequences that one GPU decodes together; default: 256")
    parser.add_argument("--erase", type=float, default=0.1, help="chance that a candidate is erased; default: 0.1")
    parser.add_argument("--end", type=float, default=0.1, help="chance that a segment is the last; default: 0.1")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation's chance")
    add_setting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    if not options.simulate:
        raise UserError("say --simulate; what a run needs in memory is said by e3rl train RECIPE --plan")
    if min(options.gpus) < 1 or options.rows < 1 or options.parameters <= 0:
        raise UserError("--gpus and --rows must be at least 1, --parameters above 0")
    config = load_config(find_recipe(options.recipe), find_recipes(options.overlay), options.overrides)

    from rich.console import Console

    Console().print(scaling_table(config, options))
    return 0


def scaling_table(config: Config, options: argparse.Namespace) -> Any:
    """A line for each number of GPUs: all of them generate and then train; some generate while the others train."""
    from rich.table import Table

    from e3rl.plan.simulation import Work, roofline, simulate_rollouts, simulate_step

    work = Work(
        groups=config.train.prompts_per_step,
        siblings=config.rollout.num_generations,
        segment_length=config.rollout.segment_length,
        segments=config.rollout.max_segments,
        erase=options.erase if config.rollout.erase else 0.0,
        end=options.end,
        max_erasures=config.erasure.max_erasures,
    )
    costs = roofline(options.parameters, options.kv_bytes, work.segment_length * work.segments / 2)
    table = Table(
        title=f"{work.groups} groups of {work.siblings}, {options.parameters:.3g} parameters", title_justify="left"
    )
    for name in (
        "GPUs",
        "together, s",
        "bottleneck",
        "apart, s",
        "generate + train",
        "speed-up",
        "barrier, %",
        "idle, %",
    ):
        table.add_column(name, justify="left" if name == "bottleneck" else "right")
    first = 0.0
    for gpus in options.gpus:
        settings = {"rows": options.rows, "seed": options.seed}
        together = simulate_step(work, costs, workers=gpus, trainers=gpus, **settings)
        splits = [t for t in sorted({max(1, gpus * part // 8) for part in range(1, 8)}) if t < gpus]
        apart = [
            (simulate_step(work, costs, workers=gpus - t, trainers=t, ahead=True, **settings), gpus - t, t)
            for t in splits
        ]
        best = min(apart, key=lambda found: found[0].seconds, default=None)
        free = simulate_rollouts(replace(work, erase=0.0), costs, gpus, options.rows, options.seed)
        rate, plain = together.rollout.tokens / together.rollout.seconds, free.tokens / free.seconds
        first = first or together.seconds
        table.add_row(
            str(gpus),
            f"{together.seconds:.1f}",
            together.bottleneck,
            f"{best[0].seconds:.1f}" if best else "",
            f"{best[1]} + {best[2]}" if best else "",
            f"{first / min(together.seconds, best[0].seconds if best else together.seconds):.1f}",
            f"{100 * (1 - rate / plain):.1f}",
            f"{100 * together.rollout.idle:.1f}",
        )
    return table
