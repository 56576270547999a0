"""`e3rl eval`: a model's held-out accuracy, plain and erasable."""

from __future__ import annotations

import argparse
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e3rl.cli.main import add_setting_arguments
from e3rl.cli.opening import open_model
from e3rl.config import Config
from e3rl.errors import RunStopped, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from e3rl.evaluate.store import SampleStore
    from e3rl.evaluate.study import SamplingPlan
    from e3rl.models import Policy
    from e3rl.types import Problem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a directory, a hub id, 'lab' or 'smollm2'")
    parser.add_argument(
        "data", nargs="+", help="held-out problems: benchmarks by name, files, hub ids or lab:FAMILY[:LEVEL]"
    )
    parser.add_argument("--erase", action="store_true", help="evaluate erasable decoding beside plain, at equal tokens")
    parser.add_argument(
        "--recipe", help="take the other settings from this recipe; default: those saved beside the model"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="directory for samples and figures; default: evals/MODEL/DATA-SETTINGS",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="directory with benchmark files (data.directory)")
    parser.add_argument("--k", type=_numbers, default=(), metavar="K,…", help="the k of Pass@k and Maj@k to report")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="divide the problems over N processes")
    parser.add_argument("--shard", metavar="I/N", help="sample only the I-th of N parts, for one machine of several")
    parser.add_argument(
        "--stop-after",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="start no problem after this time; repeat the command to continue",
    )
    add_setting_arguments(parser)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of whole numbers such as 1,8,32") from None


def run(options: argparse.Namespace) -> int:
    if options.workers < 1:
        raise UserError("--workers must be at least 1")
    if options.workers > 1 and options.shard:
        raise UserError("--workers divides one machine's work, --shard names one machine's part: give one of them")
    from rich.console import Console

    from e3rl.evaluate.figures import reported_ks

    opened = open_model(options)
    config = opened.config
    if options.data_dir:
        config = replace(config, data=replace(config.data, directory=options.data_dir))
    reported_ks(config.eval.num_samples, options.k)
    console, policy = Console(), None
    for source in options.data:
        policy = _evaluate(source, options, config, opened.calibration, console, policy)
    return 0


def _evaluate(
    source: str, options: argparse.Namespace, config: Config, calibration: Any, console: Console, policy: Policy | None
) -> Policy | None:
    """Evaluate one set of problems to the end or a stop; returns the policy if it was loaded."""
    from e3rl.data.loading import spread
    from e3rl.evaluate.identity import settings_of
    from e3rl.evaluate.store import SampleStore
    from e3rl.evaluate.study import SamplingPlan, conclude, missing
    from e3rl.lab.reward import graded_by_the_lab
    from e3rl.models import load_policy
    from e3rl.plan.fit import require_generation_fits
    from e3rl.plan.memory import ASSUMED_PROMPT

    config = graded_by_the_lab(config, source)
    problems = spread(_problems(source, config, console), config.eval.limit)
    plan = SamplingPlan(tuple(p.id for p in problems), config, options.erase)
    store = SampleStore(_directory(source, options, config))
    store.claim(settings_of(config))
    began = time.monotonic()
    try:
        if options.workers > 1:
            finished = _divide(source, options, plan, store)
        else:
            if policy is None:
                require_generation_fits(config, config.data.max_prompt_length or ASSUMED_PROMPT)
                policy = load_policy(config.model)
            finished = _sample(source, options, config, calibration, policy, problems, plan, store)
    except KeyboardInterrupt:
        finished = False
    if not finished:
        left = len(missing(plan, store))
        raise RunStopped(f"stopped with at least {left} groups to go; go on with the same command ({store.path})")
    if missing(plan, store):
        console.print(f"This shard is done; others are not ({store.path}).", soft_wrap=True, highlight=False)
        return policy
    facts = {"model": options.model, "data": source, "identity": store.identity()}
    _show(conclude(plan, store, facts, options.k), console, store, time.monotonic() - began)
    return policy


def _problems(source: str, config: Config, console: Console) -> list[Problem]:
    from e3rl.data.benchmarks import BENCHMARKS, load_benchmark
    from e3rl.data.loading import load_problems

    if source not in BENCHMARKS:
        return load_problems(source, config=config.data, split="eval")
    loaded = load_benchmark(source, config.data.directory)
    if not loaded.known:
        console.print(
            f"note: {loaded.source} has the right number of problems, but its content differs from the copy of "
            f"{source} that e3rl knows (digest {loaded.digest[:12]}): figures may differ a little from others'",
            soft_wrap=True,
        )
    return list(loaded.problems)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name.strip("/")).strip("-") or "model"


def _directory(source: str, options: argparse.Namespace, config: Config) -> Path:
    """``--output``, with a subdirectory per source if there are several; by default a path named by model, data and settings."""
    from e3rl.evaluate.identity import settings_digest

    if options.output is None:
        return Path("evals") / _slug(options.model) / f"{_slug(source)}-{settings_digest(config)}"
    output: Path = options.output
    if output.is_file():
        raise UserError(f"--output {output} is a file; it names the directory for samples and figures")
    return output / _slug(source) if len(options.data) > 1 else output


def _sample(
    source: str,
    options: argparse.Namespace,
    config: Config,
    calibration: Any,
    policy: Policy,
    problems: Sequence[Problem],
    plan: SamplingPlan,
    store: SampleStore,
) -> bool:
    """Draw the missing samples in this process."""
    from e3rl.cli.live import LiveSamples
    from e3rl.environments.episodes import tool_prompts
    from e3rl.evaluate.identity import identity
    from e3rl.evaluate.store import Shard
    from e3rl.evaluate.study import Sampler, missing
    from e3rl.rewards.scorer import Scorer

    limit = config.rollout.completion_limit
    prompts = tool_prompts(
        problems,
        policy.tokenizer,
        config,
        context_limit=policy.context_length,
        completion_limit=limit,
        ends=policy.eos_ids,
    )
    store.claim(identity(policy.model, source, prompts, config, erase=options.erase, calibration=calibration))
    shard = Shard.parse(options.shard) if options.shard else Shard()
    todo = shard.take(missing(plan, store), plan.problems)
    deadline = time.monotonic() + options.stop_after
    with (
        Scorer(config.rewards, max_completion_length=limit) as scorer,
        LiveSamples(source, sum(unit.size for unit in todo)) as live,
    ):
        sampler = Sampler(policy, prompts, config, scorer, calibration, deadline)
        return sampler.run(plan, store, shard, live.add)


def _divide(source: str, options: argparse.Namespace, plan: SamplingPlan, store: SampleStore) -> bool:
    """Draw the missing samples in worker processes; equal-budget samples follow in a second round."""
    import torch

    from e3rl.evaluate.study import missing
    from e3rl.evaluate.workers import run_workers

    arguments = ["eval", options.model, source, "--output", str(store.path)]
    for name in ("recipe", "data_dir"):
        value = getattr(options, name)
        arguments += [f"--{name.replace('_', '-')}", value] if value else []
    arguments += [part for overlay in options.overlay for part in ("--overlay", overlay)]
    arguments += ["--erase"] if options.erase else []
    arguments += ["--stop-after", str(options.stop_after)] if math.isfinite(options.stop_after) else []
    while missing(plan, store):
        if not run_workers(
            [*arguments, *options.overrides], options.workers, store.path, gpus=torch.cuda.device_count()
        ):
            return False
    return True


def _show(found: dict[str, Any], console: Console, store: SampleStore, seconds: float) -> None:
    from e3rl.evaluate.tables import budget_table, cost_table, curves_table, results_table

    rows = [(mode, found[mode]) for mode in ("plain", "erasable") if mode in found]
    console.print(results_table(f"{found['model']} on {found['data']}", rows))
    console.print(cost_table(rows))
    if len(rows[0][1]["pass"]) > 1:
        console.print(curves_table(rows))
    if "equal_budget" in found:
        console.print(budget_table(found["equal_budget"]))
    absent = sum(record["missing"] for _, record in rows)
    if absent:
        console.print(f"{absent} grades are missing and count as wrong; samples.parquet says why")
    console.print(f"{seconds:.0f} s; samples and figures: {store.path}", soft_wrap=True, highlight=False)
