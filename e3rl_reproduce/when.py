"""`e3rl reproduce when`: does erasing give accuracy that cheaper methods don't? Rows and views of the study.

Methods train from the same weights on the same problems until an equal number of generated tokens, erased ones charged;
then each is decoded in several ways. Temperatures and settings are chosen on training problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from e3rl.evaluate.metrics import bootstrap_interval, pass_at_k
from e3rl_reproduce.cells import Measure
from e3rl_reproduce.measures import DECODINGS, DecodingWay, Kind
from e3rl_reproduce.output import Line, Panel, Plot, Table
from e3rl_reproduce.results import Results, estimate
from e3rl_reproduce.study import LAB, SMOKE, SMOLLM2, Row, Scale, Study, View
from e3rl_reproduce.when_methods import BASELINES, METHODS, families, label, methods, ways

_LAB = replace(
    LAB,
    problems=128,
    together=4,
    learning_rates=(),
    token_budget=0,
    validation={},
    overrides=(
        "train.steps=100000",
        "train.max_tokens=16000",
        "train.prompts_per_step=16",
        "train.learning_rate=1e-4",
        "train.minibatches=2",
        "eval.limit=8",
        "eval.num_samples=2",
        "rollout.segment_length=2",
        "rollout.max_segments=4",
    ),
)
"""Equal generated tokens, one learning rate; within them GRPO makes most of its progress on these graphs."""

_SMOKE = replace(SMOKE, seeds=(0,))

_SMOLLM2 = replace(
    SMOLLM2,
    problems=48,
    seeds=(0, 1, 2),
    overrides=(
        *SMOLLM2.overrides,
        "train.steps=100000",
        "train.max_tokens=20000",
        "train.learning_rate=2e-5",
        "train.warmup_ratio=0.0",
        "rollout.max_rows=64",
        "rollout.cache_rows=64",
    ),
)
"""A real model, with as many tokens as fit in a few hours on two cores."""

_TUNING = 32
"""Most training problems on which temperatures and settings are chosen."""


def _rows(scale: Scale) -> tuple[Row, ...]:
    return tuple(
        Row(
            label(family, name),
            (f"methods/{METHODS[name].overlay}",),
            (*((f"data.train={family}",) if family else ()), *METHODS[name].overrides),
            tuned_as="Vanilla",
            segments=METHODS[name].segments,
        )
        for family in families(scale)
        for name in methods(scale)
    )


def _measures(scale: Scale) -> tuple[Measure, ...]:
    sizes = {"tuning": min(_TUNING, scale.problems), "problems": scale.problems}
    return (
        Measure(DECODINGS, "steps", {**sizes, "samples": scale.samples, "ways": [list(way) for way in ways(scale)]}),
    )


def _found(results: Results, row: str) -> dict[int, dict[str, Any]]:
    """The row's measurements by seed; empty if the scale leaves the row out."""
    measure = _measures(results.scale)[0]
    there = [seed for seed in results.scale.seeds if (row, seed) in results.cells]
    found = {seed: results.measurement(row, seed, measure) for seed in there}
    return {seed: item for seed, item in found.items() if item is not None}


def chosen(values: Mapping[str, Any], kind: Kind) -> str:
    """The way of a kind that is most accurate on the training problems, the first on a tie."""
    names = [name for name, value in values.items() if value["kind"] == kind]
    return max(names, key=lambda name: sum(values[name]["train"]["right"]))


def figures(result: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Avg@k and Pass@k of every problem."""
    k = result["samples"]
    return np.array(result["right"]) / k, np.array([pass_at_k(c, k, k) for c in result["right"]])


def _score(item: Mapping[str, Any], name: str) -> tuple[float, float]:
    avg_P, pass_P = figures(item["values"][name]["eval"])
    return float(avg_P.mean()), float(pass_P.mean())


def _cell(pairs: Sequence[tuple[float, float]]) -> str:
    """Avg / Pass with the half widths of their intervals over seeds."""
    avg, passed = (estimate([pair[i] for pair in pairs]) for i in (0, 1))
    return "–" if avg is None or passed is None else f"{avg.text()} / {passed.text()}"


def methods_table(results: Results) -> list[Table]:
    """Every method, decoded plainly at temperature 1, plainly at its best temperature, and with erasure."""
    k = results.scale.samples
    columns = (
        "method",
        "plain, T = 1",
        "plain, T tuned",
        "erasable, tuned",
        "tokens ×",
        "steps",
        "tokens trained",
        "seeds",
    )
    tables = []
    for family in families(results.scale):
        rows = []
        for method in METHODS:
            found = _found(results, label(family, method))
            if not found:
                continue
            plain = [_score(item, DecodingWay(1.0).name) for item in found.values()]
            tuned = [_score(item, chosen(item["values"], "plain")) for item in found.values()]
            erasable = [_score(item, chosen(item["values"], "erasable")) for item in found.values()]
            cost = [_cost(item["values"]) for item in found.values()]
            steps, tokens = (sum(item[key] for item in found.values()) / len(found) for key in ("step", "tokens"))
            numbers = (f"{sum(cost) / len(cost):.2f}", f"{steps:.0f}", f"{tokens:,.0f}", str(len(found)))
            rows.append((method, _cell(plain), _cell(tuned), _cell(erasable), *numbers))
        if not rows:
            continue
        note = (
            f"Avg@{k} / Pass@{k} on held-out problems; ± over seeds. Temperatures and settings are chosen on training problems. "
            "'tokens ×': tokens of an erasable answer over those of a plain one."
        )
        tables.append(Table(f"{family or 'The recipe'}: methods at equal generated tokens", columns, tuple(rows), note))
    return tables


def _cost(values: Mapping[str, Any]) -> float:
    return float(
        values[chosen(values, "erasable")]["eval"]["tokens"] / values[chosen(values, "plain")]["eval"]["tokens"]
    )


def _by_problem(results: Results, row: str, kind: Kind) -> tuple[np.ndarray, np.ndarray] | None:
    """Avg and Pass of every held-out problem, means over seeds, decoded in the chosen way of a kind."""
    found = _found(results, row)
    if not found:
        return None
    pairs = [figures(item["values"][chosen(item["values"], kind)]["eval"]) for item in found.values()]
    return np.mean([a for a, _ in pairs], axis=0), np.mean([p for _, p in pairs], axis=0)


def _tuning_score(results: Results, row: str, kind: Kind) -> float:
    found = [item["values"] for item in _found(results, row).values()]
    return sum(sum(values[chosen(values, kind)]["train"]["right"]) for values in found) / max(len(found), 1)


def _strongest(results: Results, family: str, methods: Sequence[str], kind: Kind) -> str | None:
    """The method that is best on the training problems."""
    there = [method for method in methods if _found(results, label(family, method))]
    return max(there, key=lambda m: _tuning_score(results, label(family, m), kind)) if there else None


def claim_table(results: Results) -> list[Table]:
    """The best baseline, plainly decoded at its best temperature, against the same decoded with erasure and against the best
    erasing method in either way."""
    erasing = [method for method in METHODS if method not in BASELINES]
    rows = []
    for family in families(results.scale):
        baseline = _strongest(results, family, BASELINES, "plain")
        contenders: list[tuple[str | None, Kind]] = [
            (baseline, "erasable"),
            (_strongest(results, family, erasing, "plain"), "plain"),
            (_strongest(results, family, erasing, "erasable"), "erasable"),
        ]
        theirs = _by_problem(results, label(family, baseline), "plain") if baseline else None
        if baseline is None or theirs is None:
            continue
        rows.append(
            (family, f"{baseline}, plain (best baseline)", *_interval(theirs[0]), *_interval(theirs[1]), "", "", "")
        )
        for method, kind in contenders:
            ours = _by_problem(results, label(family, method), kind) if method else None
            if ours is not None:
                gaps = [_signed(mine - other) for mine, other in zip(ours, theirs, strict=True)]
                relative = f"{100 * (ours[0].mean() / max(theirs[0].mean(), 1e-9) - 1):+.0f} %"
                rows.append(
                    (family, f"{method}, {kind}", *_interval(ours[0]), *_interval(ours[1]), gaps[0], relative, gaps[1])
                )
    k = results.scale.samples
    columns = ("problems", "variant", f"Avg@{k}", f"Pass@{k}", "Avg, difference", "relative", "Pass, difference")
    note = (
        "Means over seeds; intervals: 95 %, bootstrap over problems, differences paired by problem. Training tokens are equal. "
        f"Pass@{k} counts {k} answers in either way, and an erasable one costs more: Pass at equal tokens is what "
        "`benchmarks/late_erasing.py` compares."
    )
    return [Table("The claim: 5 % relative over the best baseline, Pass@k kept", columns, tuple(rows), note)]


def _interval(values_P: np.ndarray) -> tuple[str]:
    low, high = bootstrap_interval(values_P)
    return (f"{values_P.mean():.3f} ({low:.3f}–{high:.3f})",)


def _signed(values_P: np.ndarray) -> str:
    low, high = bootstrap_interval(values_P)
    return f"{values_P.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def methods_plot(results: Results) -> list[Plot]:
    """Every method's Avg, plainly and erasably decoded, as bars; whiskers are intervals over problems."""
    panels = []
    for family in families(results.scale):
        there = [m for m in METHODS if _found(results, label(family, m))]
        lines = []
        for kind in get_args(Kind):
            found = [_by_problem(results, label(family, m), kind) for m in there]
            avg = [pair[0] for pair in found if pair is not None]
            low, high = zip(*(bootstrap_interval(avg_P) for avg_P in avg), strict=True) if avg else ((), ())
            means = tuple(float(avg_P.mean()) for avg_P in avg)
            lines.append(Line(f"{kind}, tuned", tuple(map(float, range(len(avg)))), means, low, high))
        panels.append(
            Panel(
                family or "the recipe",
                "",
                f"Avg@{results.scale.samples}",
                tuple(lines),
                "bars",
                categories=tuple(there),
            )
        )
    return [Plot("Avg by method", tuple(panels), "Held-out problems, means over seeds; 95 %, bootstrap over problems.")]


def ways_table(results: Results) -> list[Table]:
    """The untrained model decoded in every way: the effect of decoding only."""
    tables = []
    for family in families(results.scale):
        found = _found(results, label(family, "Vanilla"))
        if not found:
            continue
        values = next(iter(found.values()))["values"]
        rows = []
        for name, value in values.items():
            avg_P, pass_P = figures(value["eval"])
            rows.append((name, *_interval(avg_P), *_interval(pass_P), f"{value['eval']['tokens']:.1f}"))
        k = results.scale.samples
        columns = ("decoding", f"Avg@{k}", f"Pass@{k}", "tokens/answer")
        tables.append(Table(f"{family or 'The recipe'}: decoding the model as it is", columns, tuple(rows)))
    return tables


_VIEWS: tuple[View, ...] = (claim_table, methods_table, methods_plot, ways_table)

WHEN = Study(
    name="when",
    title="When does erasing help?",
    rows=_rows,
    measures=_measures,
    views=_VIEWS,
    models=("Qwen3-4B",),
    methods={"Vanilla": Row("Vanilla", ("methods/vanilla",))},
    scales={"smoke": _SMOKE, "lab": _LAB, "smollm2": _SMOLLM2},
    notes="Every method at the same learning rate, chosen for GRPO on training problems.",
)
