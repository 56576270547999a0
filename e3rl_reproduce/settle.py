"""`e3rl reproduce settle`: could erasing in training pay at all? An oracle's upper bound, and what its labels buy otherwise.

Every row trains the embedded model, made worse by noise on its weights, so that it knows how and is seldom right. Chains have
one operation a segment. Rows of a seed have the same weights, prompts and draws. 'Equal tokens' is where a run had generated
as many tokens, erased ones included, as GRPO in all its steps, on a straight line between two evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from e3rl.config import Config, load_config
from e3rl.diagnose.statistics import erasing_yield
from e3rl.errors import UserError
from e3rl.files import atomic_directory
from e3rl.models import Policy, load_policy
from e3rl.train.run_directory import read_lines
from e3rl.weights.files import save_pretrained
from e3rl_reproduce.cells import Measure
from e3rl_reproduce.output import Panel, Plot, Table
from e3rl_reproduce.results import Results, SeedMean, difference, estimate
from e3rl_reproduce.study import LAB, SMOKE, Row, Scale, Study
from e3rl_reproduce.views import banded, text

NOISE = 0.09
"""Standard deviations of each weight matrix: chain 4 begins at 0.1."""

_CURVE = Measure("e3rl_reproduce.settle:curve")
_JUDGED = (
    "rollout.erase=true",
    "erasure.baseline=static",
    "erasure.static_baseline=0.5",
    "erasure.eta=0",
)
_SEQUENCE = "objective.allocation=sequence"
_CONTRAST = (_SEQUENCE, "objective.erased=contrast")
_STEP_CREDIT = "objective.name=e3rl_reproduce.oracle:StepCredit"
_PLAIN = "rollout.erase=false"


def _oracle(name: str) -> tuple[str, ...]:
    return (*_JUDGED, f"erasure.metric=e3rl_reproduce.oracle:oracle_{name}")


def _credit(name: str) -> tuple[str, ...]:
    """The same labels as rewards for segments: everything is judged and nothing erased."""
    return (_STEP_CREDIT, _SEQUENCE, *_oracle(name), "erasure.max_erasures=0")


GRPO, CONTRAST, DROPPED = "GRPO", "oracle 0.95, contrast", "oracle 0.95, dropped"
LOSS, CREDIT = "E³RL's loss, plain rollouts", "step credit 0.95, plain rollouts"
BOTH = "oracle 0.95, contrast and step credit"
STOPPED = "oracle 0.95, contrast, stopped at 62,000 tokens"
"""Evaluated where GRPO's tokens are spent: what the straight line between evaluations takes from the same run."""

ROWS = (
    Row(GRPO, ("methods/grpo",)),
    Row(DROPPED, ("methods/grpo",), _oracle("95")),
    Row(CONTRAST, ("methods/e3rl",), (*_CONTRAST, *_oracle("95"))),
    Row(LOSS, ("methods/e3rl",), (_SEQUENCE, _PLAIN)),
    Row(CREDIT, ("methods/e3rl",), _credit("95")),
    Row("oracle 0.85, contrast", ("methods/e3rl",), (*_CONTRAST, *_oracle("85"))),
    Row("oracle 0.70, contrast", ("methods/e3rl",), (*_CONTRAST, *_oracle("70"))),
    Row(
        "oracle 0.95, whole responses, contrast",
        ("methods/e3rl",),
        (*_CONTRAST, *_oracle("95"), "train.max_tokens=64000"),
        segments=1,
    ),
    Row("step credit 0.85, plain rollouts", ("methods/e3rl",), _credit("85")),
    Row("step credit 0.70, plain rollouts", ("methods/e3rl",), _credit("70")),
    Row(BOTH, ("methods/e3rl",), (_STEP_CREDIT, *_CONTRAST, *_oracle("95"))),
    Row(STOPPED, ("methods/e3rl",), (*_CONTRAST, *_oracle("95"), "train.max_tokens=62000")),
)
_SMOKE_ROWS = (GRPO, CONTRAST, CREDIT)

_BY_THE_CLOCK = "By the clock, on what else the machine did as well; evaluations are left out."

PAIRS = (
    (CONTRAST, CREDIT),
    ("oracle 0.85, contrast", "step credit 0.85, plain rollouts"),
    ("oracle 0.70, contrast", "step credit 0.70, plain rollouts"),
    (BOTH, CREDIT),
    (STOPPED, CREDIT),
    (CONTRAST, LOSS),
    (CONTRAST, DROPPED),
    (CREDIT, LOSS),
)
"""What is compared with what, besides all with GRPO."""

_SCALES = {
    "smoke": replace(
        SMOKE,
        seeds=(0,),
        overrides=(*SMOKE.overrides, "train.eval_steps=1", "train.minibatches=1", "train.learning_rate=5e-5"),
        token_budget=0,
        validation={},
    ),
    "lab": replace(
        LAB,
        seeds=tuple(range(8)),
        learning_rates=(),
        token_budget=0,
        validation={},
        together=1,
        overrides=(
            "data.train=lab:chain:4",
            "data.eval=lab:chain:4",
            "rollout.segment_length=8",
            "rollout.max_segments=8",
            "train.steps=16",
            "train.prompts_per_step=8",
            "train.minibatches=1",
            "train.learning_rate=5e-5",
            "train.eval_steps=8",
            "eval.limit=64",
            "eval.num_samples=4",
        ),
    ),
}


def _rows(scale: Scale) -> tuple[Row, ...]:
    return tuple(row for row in ROWS if scale.name != "smoke" or row.label in _SMOKE_ROWS)


def weakened(scale: Scale, out: Path) -> tuple[str, ...]:
    """The embedded model with noise on its weight matrices, the same each time, under ``out``; the settings that name it."""
    if scale.name not in _SCALES:
        raise UserError(f"settle: the oracle judges lab problems alone, so its scales are {' and '.join(_SCALES)}")
    path = out / f"weakened-{NOISE:g}"
    if not path.is_dir():
        policy = load_policy(load_config(overrides=["model.path=lab"]).model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in policy.model.parameters():
                if weight.ndim == 2:
                    weight += NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
        with atomic_directory(path) as temporary:
            save_pretrained(policy, temporary, "The embedded model with noise on its weights.\n")
    return (f"model.path={path}", "model.device=cpu")


def curve(policy: Policy, config: Config) -> dict[str, Any]:
    """A run's evaluations as (step, tokens so far, Avg, Pass), its tokens, seconds, and r in its first four steps."""
    path = Path(config.run.output_dir) / config.run.name
    lines, k = read_lines(path / "metrics.jsonl"), config.eval.num_samples
    tokens = {0: 0} | {line["step"]: line["tokens_total"] for line in lines}
    evaluations = read_lines(path / "evaluations.jsonl")
    points = [(e["step"], tokens[e["step"]], e[f"avg@{k}"], e[f"pass@{k}"]) for e in evaluations]
    seconds = sum(line["seconds_rollout"] + line["seconds_reward"] + line["seconds_train"] for line in lines)
    r = fmean(line["r"] for line in lines[:4])
    return {"curve": points, "tokens": lines[-1]["tokens_total"], "seconds": seconds, "r": r}


Runs = Mapping[int, Mapping[str, Any]]
"""`curve` of each seed."""


def after(run: Mapping[str, Any], tokens: float = math.inf) -> tuple[float, float]:
    """Avg and Pass when so many tokens were generated, on straight lines between evaluations; at most at the end."""
    _, spent, avg, passed = np.array(run["curve"]).T
    return float(np.interp(tokens, spent, avg)), float(np.interp(tokens, spent, passed))


def _runs(results: Results) -> dict[str, Runs]:
    """What was measured, by row; rows that have not run are empty."""
    by_seed = {
        row.label: {seed: results.measurement(row.label, seed, _CURVE) for seed in results.scale.seeds}
        for row in results.rows
    }
    return {label: {seed: item["values"] for seed, item in items.items() if item} for label, items in by_seed.items()}


def _at_equal(runs: Runs, base: Runs, what: str, place: int) -> dict[int, float]:
    """Avg (``place`` 0) or Pass (1) by seed, at the end or when GRPO's tokens were spent."""
    there = [seed for seed in runs if seed in base]
    return {seed: after(runs[seed], base[seed]["tokens"] if what == "tokens" else math.inf)[place] for seed in there}


def bound_table(results: Results) -> list[Table]:
    """Every row at equal steps and at equal tokens, and its differences from GRPO, paired by seed."""
    found, lines = _runs(results), []
    base = found[GRPO]
    for label, runs in found.items():
        cells = []
        for what in ("steps", "tokens"):
            ours, theirs = (_at_equal(r, base, what, 0) for r in (runs, base))
            cells += [text(estimate(list(ours.values()))), text(difference(ours, theirs), sign=True)]
        passed = text(estimate(list(_at_equal(runs, base, "tokens", 1).values())))
        ratio = estimate([run["tokens"] / base[seed]["tokens"] for seed, run in runs.items() if seed in base])
        r = estimate([run["r"] for run in runs.values()])
        lines.append((label, *cells, passed, _mean(ratio), _mean(r), str(len(runs))))
    k = results.cells[GRPO, results.scale.seeds[0]].config.eval.num_samples
    columns = (
        "rollouts",
        "Avg, equal steps",
        "− GRPO",
        "Avg, equal tokens",
        "− GRPO",
        f"Pass@{k}, equal tokens",
        "tokens ×",
        "r at first",
        "seeds",
    )
    start = text(estimate([run["curve"][0][2] for run in base.values()]))
    return [Table("At equal steps and at equal tokens", columns, tuple(lines), f"All begin at {start}.")]


def _mean(found: SeedMean | None) -> str:
    return "–" if found is None else f"{found.mean:.2f}"


def pairs_table(results: Results) -> list[Table]:
    """`PAIRS`, over the seeds that both have."""
    found, lines = _runs(results), []
    for ours, theirs in PAIRS:
        if found.get(ours) and found.get(theirs):
            gaps = [
                difference(*(_at_equal(found[label], found[GRPO], what, 0) for label in (ours, theirs)))
                for what in ("steps", "tokens")
            ]
            shared = len(found[ours].keys() & found[theirs].keys() & found[GRPO].keys())
            lines.append((f"{ours} − {theirs}", *(text(gap, sign=True) for gap in gaps), str(shared)))
    return [Table("Against each other", ("Avg", "equal steps", "equal tokens", "seeds"), tuple(lines))]


def predicted_table(results: Results) -> list[Table]:
    """What the theory says of dropping at the success rate that was begun with, and r beside the measured one."""
    found = _runs(results)
    start = estimate([run["curve"][0][2] for run in found[GRPO].values()])
    if start is None:
        return []
    segments, lines = results.cells[GRPO, results.scale.seeds[0]].config.rollout.max_segments, []
    for auroc in (0.70, 0.85, 0.95):
        here = erasing_yield(start.mean, segments, auroc)
        runs = found.get(f"oracle {auroc:.2f}, contrast", {})
        measured = _mean(estimate([run["r"] for run in runs.values()]))
        lines.append((f"{auroc:.2f}", f"{here.ratio:.2f}", f"{here.r:.2f}", measured))
    note = (
        f"Success {start.mean:.2f}, {segments} segments: what a token of erasing rollouts teaches over one of plain ones, where "
        "erased candidates are dropped (`e3rl diagnose` tells it of your model). Contrast is beside this theory."
    )
    columns = ("AUROC", "yield of a token", "r, predicted", "r, measured")
    return [Table("What was predicted", columns, tuple(lines), note)]


def progress_plot(results: Results) -> list[Plot]:
    """Avg by generated tokens."""
    lines = []
    for label, runs in _runs(results).items():
        by_place = zip(*(run["curve"] for run in runs.values()), strict=False)
        points = [
            (fmean(point[1] for point in there), mean)
            for there in by_place
            if (mean := estimate([point[2] for point in there]))
        ]
        if points:
            lines.append(banded(label, points))
    return [Plot("Avg by generated tokens", (Panel("held-out problems", "tokens", "Avg", tuple(lines)),))]


def compute_table(results: Results) -> list[Table]:
    """Seconds of the training steps by the clock, evaluations left out."""
    lines: list[tuple[str, str]] = []
    for label, runs in _runs(results).items():
        lines.append((label, f"{sum(run['seconds'] for run in runs.values()):.0f}"))
    total = sum(float(seconds) for _, seconds in lines)
    return [
        Table("Compute", ("rollouts", "seconds of steps, all seeds"), (*lines, ("all", f"{total:.0f}")), _BY_THE_CLOCK)
    ]


def _measures(scale: Scale) -> Sequence[Measure]:
    return (_CURVE,)


SETTLE = Study(
    name="settle",
    title="Where would erasing in training pay?",
    rows=_rows,
    measures=_measures,
    views=(bound_table, pairs_table, progress_plot, predicted_table, compute_table),
    models=(),
    scales=_SCALES,
    prepare=weakened,
    notes="The oracle (`e3rl_reproduce.oracle`) knows the first wrong step with a set AUROC: an upper bound, no method.",
)
