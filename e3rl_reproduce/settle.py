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

from e3rl.config import Config
from e3rl.diagnose.statistics import erasing_yield
from e3rl.models import Policy
from e3rl.train.run_directory import read_lines
from e3rl_reproduce.cells import Measure
from e3rl_reproduce.measures import DecodingWay
from e3rl_reproduce.output import Panel, Plot, Table
from e3rl_reproduce.results import Results, SeedMean, difference, estimate
from e3rl_reproduce.resumed import GENERATED
from e3rl_reproduce.settle_rows import SHOWN, Comparison, settings
from e3rl_reproduce.settle_scales import CONFIRMED, NOISE, SCALES, weakened, weakened_name
from e3rl_reproduce.study import Row, Scale, Study
from e3rl_reproduce.views import banded, text
from e3rl_reproduce.when import chosen, figures

_CURVE = Measure("e3rl_reproduce.settle:curve")
_BY_THE_CLOCK = "By the clock, on what else the machine did as well; evaluations are left out."


def _rows(scale: Scale) -> tuple[Row, ...]:
    """Where a comparison has noise of its own, its rows name the weights that `weakened` put beside the others'."""
    found: list[Row] = []
    usual = dict(override.split("=", 1) for override in scale.overrides).get("model.path", weakened_name(NOISE))
    for setting in settings(scale):
        model = f"model.path={Path(usual).with_name(weakened_name(setting.noise))}"
        named = () if setting.noise == NOISE else (model,)
        found += [replace(row, overrides=(*named, *row.overrides)) for row in setting.rows]
    return tuple(found)


def curve(policy: Policy, config: Config) -> dict[str, Any]:
    """A run's evaluations as (step, tokens so far, Avg, Pass, share of finished), its tokens, seconds, and r in its first four
    steps."""
    path = Path(config.run.output_dir) / config.run.name
    lines, k = read_lines(path / "metrics.jsonl"), config.eval.num_samples
    tokens = {0: 0} | {line["step"]: line["tokens_total"] for line in lines}
    if told := {line["step"]: line["tokens"] for line in read_lines(path / GENERATED)}:
        tokens = {step: sum(count for other, count in told.items() if other <= step) for step in tokens}
    evaluations = read_lines(path / "evaluations.jsonl")
    points = [(e["step"], tokens[e["step"]], e[f"avg@{k}"], e[f"pass@{k}"], e["finish_ratio"]) for e in evaluations]
    seconds = sum(line["seconds_rollout"] + line["seconds_reward"] + line["seconds_train"] for line in lines)
    r = fmean(line["r"] for line in lines[:4])
    return {"curve": points, "tokens": tokens[lines[-1]["step"]], "seconds": seconds, "r": r}


Runs = Mapping[int, Mapping[str, Any]]
"""`curve` of each seed."""


def after(run: Mapping[str, Any], tokens: float = math.inf) -> tuple[float, float, float]:
    """Avg, Pass and the share of finished answers when so many tokens were generated, on straight lines between evaluations; at
    most at the end."""
    _, spent, *columns = np.array(run["curve"]).T
    avg, passed, finished = (float(np.interp(tokens, spent, column)) for column in columns)
    return avg, passed, finished


def _taken(results: Results, label: str, measure: Measure) -> dict[int, Mapping[str, Any]]:
    """What was measured of a row, by seed."""
    found = {seed: results.measurement(label, seed, measure) for seed in results.scale.seeds}
    return {seed: item["values"] for seed, item in found.items() if item}


def _runs(results: Results, setting: Comparison) -> dict[str, Runs]:
    """What was measured, by row; rows that have not run are empty."""
    return {row.label: _taken(results, row.label, _CURVE) for row in setting.rows}


def _at_equal(runs: Runs, base: Runs, what: str, place: int) -> dict[int, float]:
    """Avg (``place`` 0), Pass (1) or finished (2) by seed, at the end or when the base's tokens were spent."""
    there = [seed for seed in runs if seed in base]
    return {seed: after(runs[seed], base[seed]["tokens"] if what == "tokens" else math.inf)[place] for seed in there}


def bound_table(results: Results) -> list[Table]:
    """Every row at equal steps and at equal tokens, and its differences from the first, paired by seed."""
    return [_bound(results, setting) for setting in settings(results.scale)]


def _bound(results: Results, setting: Comparison) -> Table:
    found, lines = _runs(results, setting), []
    base = found[setting.base]
    for label, runs in found.items():
        cells = []
        for what in ("steps", "tokens"):
            ours, theirs = (_at_equal(r, base, what, 0) for r in (runs, base))
            cells += [text(estimate(list(ours.values()))), text(difference(ours, theirs), sign=True)]
        passed = text(estimate(list(_at_equal(runs, base, "tokens", 1).values())))
        ratio = estimate([run["tokens"] / base[seed]["tokens"] for seed, run in runs.items() if seed in base])
        r = estimate([run["r"] for run in runs.values()])
        lines.append((label, *cells, passed, _mean(ratio), _mean(r), str(len(runs))))
    k = results.cells[setting.base, results.scale.seeds[0]].config.eval.num_samples
    columns = (
        "rollouts",
        "Avg, equal steps",
        "− the first",
        "Avg, equal tokens",
        "− the first",
        f"Pass@{k}, equal tokens",
        "tokens ×",
        "r at first",
        "seeds",
    )
    start = text(estimate([run["curve"][0][2] for run in base.values()]))
    title = f"{setting.title}: at equal steps and at equal tokens"
    note = (
        f"All begin at {start}. Where tokens × is below 1, what stands at equal tokens is the end, with fewer tokens."
    )
    return Table(title, columns, tuple(lines), note)


def _mean(found: SeedMean | None) -> str:
    return "–" if found is None else f"{found.mean:.2f}"


def pairs_table(results: Results) -> list[Table]:
    """Each setting's pairs, over the seeds that both have."""
    lines = []
    for setting in settings(results.scale):
        found = _runs(results, setting)
        for ours, theirs in setting.pairs:
            if found[ours] and found[theirs]:
                gaps = [
                    difference(*(_at_equal(found[label], found[setting.base], what, 0) for label in (ours, theirs)))
                    for what in ("steps", "tokens")
                ]
                shared = len(found[ours].keys() & found[theirs].keys() & found[setting.base].keys())
                lines.append((f"{ours} − {theirs}", *(text(gap, sign=True) for gap in gaps), str(shared)))
    return [Table("Against each other", ("Avg", "equal steps", "equal tokens", "seeds"), tuple(lines))]


def finishing_table(results: Results) -> list[Table]:
    """Where answers are cut off: the share that ends, and how many of those are right, at the end and at equal tokens."""
    tables = []
    for setting in settings(results.scale):
        found, lines = _runs(results, setting), []
        base = found[setting.base]
        for label, runs in found.items():
            cells = []
            for what in ("steps", "tokens"):
                right, finished = (_at_equal(runs, base, what, place) for place in (0, 2))
                shares = [right[seed] / finished[seed] for seed in right if finished[seed]]
                cells += [text(estimate(list(finished.values()))), text(estimate(shares))]
            lines.append((label, *cells))
        ended = estimate([run["curve"][0][4] for run in base.values()])
        if ended and ended.mean < _ALL_END:
            columns = (
                "rollouts",
                "finished, equal steps",
                "right of those",
                "finished, equal tokens",
                "right of those",
            )
            title = f"{setting.title}: answers that end by themselves"
            tables.append(Table(title, columns, tuple(lines), f"At first {text(ended)} end."))
    return tables


_ALL_END = 0.95
"""A share of finished answers above which nothing is left to say about finishing."""


def colder_table(results: Results) -> list[Table]:
    """Rows that are decoded colder: at T = 1 and at the temperature that is best on training problems, against the first."""
    lines = []
    for setting in settings(results.scale):
        found = {row.label: _taken(results, row.label, row.measures[0]) for row in setting.rows if row.measures}
        avg = {
            label: [{seed: _right(values, way) for seed, values in by_seed.items()} for way in (_AT_ONE, "")]
            for label, by_seed in found.items()
        }
        for label in (label for label in found if found[label]):
            cells = []
            for ours, theirs in zip(avg[label], avg[setting.base], strict=True):
                cells += [text(estimate(list(ours.values()))), text(difference(ours, theirs), sign=True)]
            lines.append((label, *cells, str(len(found[label]))))
    columns = ("rollouts", "Avg, T = 1", "− the first", "Avg, best T", "− the first", "seeds")
    return [Table("What a temperature buys, at equal steps", columns, tuple(lines))] if lines else []


def claims_table(results: Results) -> list[Table]:
    """Each pair's differences: Avg at T = 1 and at equal tokens, Avg at the best temperature after all steps, and Pass."""
    lines = []
    for setting in settings(results.scale):
        found = _runs(results, setting)
        base, measures = found[setting.base], {row.label: row.measures for row in setting.rows}
        for pair in (pair for pair in setting.pairs if found[pair[0]] and found[pair[1]]):
            ours, theirs = pair
            gaps = [difference(*(_at_equal(found[label], base, "tokens", place) for label in pair)) for place in (0, 1)]
            colder = [_taken(results, label, measure) for label in pair for measure in measures[label]]
            best = [{seed: _right(values, "") for seed, values in by_seed.items()} for by_seed in colder]
            gaps.insert(1, difference(*best) if best else None)
            shared = len(found[ours].keys() & found[theirs].keys())
            lines.append((f"{ours} − {theirs}", *(text(gap, sign=True) for gap in gaps), str(shared)))
    columns = ("difference", "Avg, T = 1, equal tokens", "Avg, best T", "Pass, T = 1, equal tokens", "seeds")
    return [Table("What was claimed", columns, tuple(lines))]


_AT_ONE = DecodingWay(1.0).name


def _right(values: Mapping[str, Any], way: str) -> float:
    """Avg on held-out problems, decoded in a way; empty: the best on training problems."""
    return float(figures(values[way or chosen(values, "plain")]["eval"])[0].mean())


def predicted_table(results: Results) -> list[Table]:
    """What the theory says of dropping at the success rates that were begun with, and r beside the measured one."""
    lines = []
    for setting in settings(results.scale):
        found = _runs(results, setting)
        start = estimate([run["curve"][0][2] for run in found[setting.base].values()])
        if start is None or not setting.bound:
            continue
        segments = results.cells[setting.base, results.scale.seeds[0]].config.rollout.max_segments
        for auroc in (0.70, 0.85, 0.95):
            label = next((label for label in found if label.endswith(f"oracle {auroc:.2f}, contrast")), None)
            if label is not None:
                here = erasing_yield(start.mean, segments, auroc)
                measured = _mean(estimate([run["r"] for run in found[label].values()]))
                where = (setting.title, f"{start.mean:.2f}", str(segments), f"{auroc:.2f}")
                lines.append((*where, f"{here.ratio:.2f}", f"{here.r:.2f}", measured))
    note = (
        "What a token of erasing rollouts teaches over one of plain ones, where erased candidates are dropped (`e3rl diagnose` "
        "tells it of your model). Contrast is beside this theory."
    )
    columns = ("problems", "success", "segments", "AUROC", "yield of a token", "r, predicted", "r, measured")
    return [Table("What was predicted", columns, tuple(lines), note)] if lines else []


def progress_plot(results: Results) -> list[Plot]:
    """Avg by generated tokens, a panel for each setting; a method has one colour in all of them."""
    panels = []
    for setting in settings(results.scale):
        found = {label.rpartition(": ")[2]: runs for label, runs in _runs(results, setting).items()}
        lines = []
        for label in SHOWN:
            by_place = zip(*(run["curve"] for run in found.get(label, {}).values()), strict=False)
            points = [
                (fmean(point[1] for point in there), mean)
                for there in by_place
                if (mean := estimate([point[2] for point in there]))
            ]
            lines.append(banded(label, points))
        panels.append(Panel(f"{setting.title}, held-out problems", "tokens", "Avg", tuple(lines)))
    return [Plot("Avg by generated tokens", tuple(panels))]


def compute_table(results: Results) -> list[Table]:
    """Seconds of the training steps by the clock, evaluations left out."""
    lines: list[tuple[str, str]] = []
    for setting in settings(results.scale):
        for label, runs in _runs(results, setting).items():
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
    views=(bound_table, pairs_table, finishing_table, colder_table, progress_plot, predicted_table, compute_table),
    models=(),
    scales=SCALES,
    prepare=weakened,
    notes=(
        "`e3rl reproduce settle --scale lab --jobs 2`. The oracle (`e3rl_reproduce.oracle`) knows the first wrong step with a "
        "set AUROC: an upper bound, no method. Resets, branches and pruning are `e3rl_reproduce.resumed`'s."
    ),
)

CONFIRM = replace(
    SETTLE,
    name="confirm",
    title="Step credit by a critic, on new seeds",
    views=(claims_table, bound_table, colder_table, finishing_table, progress_plot, compute_table),
    scales=CONFIRMED,
    notes="The rows of `settle` that were left to decide, on seeds that nothing was chosen with.",
)
