"""`e3rl plan --simulate`: how long a step takes on any number of GPUs, and its bottleneck."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from e3rl.cli.main import add_setting_arguments
from e3rl.cli.recipes import find_recipe, find_recipes, recipe_names
from e3rl.config import Config, load_config
from e3rl.errors import UserError

if TYPE_CHECKING:
    from e3rl.plan.simulation import Costs, StepTime, Work

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
COLUMNS = ("GPUs", "rows", "together", "bottleneck", "apart", "generate + train", "speed-up", "barrier %", "idle %")


def add_arguments(parser: argparse.ArgumentParser) -> None:

    parser.add_argument("recipe", help=f"a TOML file, or one of: {', '.join(recipe_names())}")
    parser.add_argument("--simulate", action="store_true", help="simulate rollouts and training from 1 to 1,024 GPUs")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS), metavar="N", help="numbers of GPUs")
    parser.add_argument("--parameters", type=float, default=4e9, help="of the model; default: 4e9")
    parser.add_argument(
        "--kv-bytes", type=float, default=147456, help="of a token's keys and values; default: Qwen3-4B's"
    )
    parser.add_argument(
        "--rows", type=int, default=256, help="most sequences that one GPU decodes together; default: 256"
    )
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt; default: 256")
    parser.add_argument("--erase", type=float, default=0.1, help="chance that a candidate is erased; default: 0.1")
    parser.add_argument("--end", type=float, default=0.1, help="chance that a segment is the last; default: 0.1")
    parser.add_argument("--seed", type=int, default=0, help="seed of the simulation")
    add_setting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    if not options.simulate:
        raise UserError("add --simulate; e3rl train RECIPE --plan shows the memory that a run needs")
    if min(options.gpus) < 1 or options.rows < 1 or options.parameters <= 0:
        raise UserError("--gpus and --rows must be at least 1, --parameters above 0")
    config = load_config(find_recipe(options.recipe), find_recipes(options.overlay), options.overrides)

    from rich.console import Console

    Console().print(scaling_table(config, options))
    return 0


def scaling_table(config: Config, options: argparse.Namespace) -> Any:
    """A row per number of GPUs: all generate and then train, or some generate while the others train."""
    from rich.table import Table

    from e3rl.plan.simulation import Gpu, fitting_rows, operations, read_context, roofline, simulate_step

    work, seed, engine = _work(config, options), options.seed, config.rollout.engine
    length = work.segment_length * work.segments
    context, flops = read_context(length, engine), operations(config)
    costs = roofline(options.parameters, options.kv_bytes, context, flops, prompt=work.prompt_tokens)
    trained = options.parameters * (18 if flops else 2)  # float32 master, sum and moments; copies

    def rows(held: float) -> int:
        """Rows of an engine beside ``held`` bytes; the torch engine's have slots of full length."""
        size = context if engine == "vllm" else length + work.prompt_tokens
        return fitting_rows(options.rows, options.parameters, options.kv_bytes, size, held, Gpu())

    table = Table(
        title=f"{work.groups} groups of {work.siblings}, {options.parameters:.3g} parameters, {flops:g} operations a weight and "
        "token in training; seconds",
        title_justify="left",
    )
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "bottleneck" else "right", no_wrap=name == "bottleneck")
    first, alone = 0.0, rows(0.0)
    for gpus in options.gpus:
        fit, together, best = rows(trained / gpus), None, None
        if fit >= work.siblings:
            together = simulate_step(work, costs, workers=gpus, trainers=gpus, rows=fit, seed=seed)
        if alone >= work.siblings:
            best = _best_split(work, costs, gpus, alone, trained, seed)
        seconds = [found.seconds for found in (together, best and best[0]) if found]
        first = first or min(seconds, default=0.0)
        table.add_row(
            str(gpus),
            str(fit),
            f"{together.seconds:.1f}" if together else "–",
            together.bottleneck if together else "",
            f"{best[0].seconds:.1f}" if best else "",
            f"{gpus - best[1]} + {best[1]}" if best else "",
            f"{first / min(seconds):.1f}" if seconds else "",
            *(_lost(work, costs, together, gpus, fit, seed) if together else ("", "")),
        )
    return table


def _work(config: Config, options: argparse.Namespace) -> Work:
    from e3rl.plan.simulation import Work

    return Work(
        groups=config.train.prompts_per_step,
        siblings=config.rollout.num_generations,
        segment_length=config.rollout.segment_length,
        segments=config.rollout.max_segments,
        erase=options.erase if config.rollout.erase else 0.0,
        end=options.end,
        max_erasures=config.erasure.max_erasures,
        prompt_tokens=options.prompt,
    )


def _best_split(
    work: Work, costs: Costs, gpus: int, rows: int, trained: float, seed: int
) -> tuple[StepTime, int] | None:
    """The fastest step with some GPUs as trainers, whose memory must hold ``trained`` bytes, and their number."""
    from e3rl.plan.simulation import Gpu, simulate_step

    found = [
        (simulate_step(work, costs, workers=gpus - t, trainers=t, rows=rows, ahead=True, seed=seed), t)
        for t in sorted({max(1, gpus * part // 8) for part in range(1, 8)})
        if t < gpus and trained / t < Gpu().memory
    ]
    return min(found, key=lambda split: split[0].seconds, default=None)


def _lost(work: Work, costs: Costs, step: StepTime, gpus: int, rows: int, seed: int) -> tuple[str, str]:
    """Throughput lost to erasing, and idle time of workers, in percent."""
    from e3rl.plan.simulation import simulate_rollouts

    free = simulate_rollouts(replace(work, erase=0.0), costs, gpus, rows, seed)
    rate, plain = step.rollout.tokens / step.rollout.seconds, free.tokens / free.seconds
    return f"{100 * (1 - rate / plain):.1f}", f"{100 * step.rollout.idle:.1f}"
