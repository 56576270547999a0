"""Figures of graded samples: accuracy with intervals, format, length and cost, also at an equal budget of tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from e3rl.errors import UserError
from e3rl.evaluate.metrics import (
    KS,
    avg_at_k,
    between,
    bootstrap_interval,
    maj_at_k,
    paired_difference,
    pass_at_k_by_problem,
)
from e3rl.evaluate.samples import Sample
from e3rl.rewards.answers import LONGEST_ANSWER, vote

MEAN = "mean"
"""The value of ``data`` in evaluations.jsonl for the mean over several sources."""

Table = Sequence[Sequence[Sample]]
"""Samples by problem, the same number for each."""


def correct_table(samples_PK: Table) -> np.ndarray:
    """Which samples are right, [P, K]. A missing grade counts as wrong."""
    return np.array([[s.correct is True for s in row] for row in samples_PK], dtype=bool)


def reported_ks(samples: int, wanted: Sequence[int] = ()) -> list[int]:
    """The k to report: those asked for, else the powers of two up to the number of samples, and that number."""
    for k in wanted:
        if not 1 <= k <= samples:
            raise UserError(
                f"Pass@{k} needs at least {k} samples of each problem, and there are {samples}: raise eval.num_samples "
                "or ask for another k"
            )
    return sorted(set(wanted)) or sorted({k for k in KS if k <= samples} | {samples})


@functools.lru_cache(2**14)
def _spelled(answer: str) -> str:
    """The key under which an answer is counted."""
    return vote(answer[:LONGEST_ANSWER])


def majority(samples_PK: Table, k: int) -> np.ndarray:
    """Maj@k of every problem, [P]; a number is one answer however it is written."""
    return np.array(
        [
            maj_at_k([s.answer and _spelled(s.answer) for s in row], [s.correct is True for s in row], k, seed=p)
            for p, row in enumerate(samples_PK)
        ]
    )


def _curve(ks: Iterable[int], values: Callable[[int], np.ndarray]) -> dict[str, Any]:
    found = {k: values(k) for k in ks}
    return {str(k): {"value": float(v.mean()), "ci95": list(bootstrap_interval(v))} for k, v in found.items()}


def share(part: float, whole: float) -> float:
    """``part / whole``; 0 of nothing."""
    return part / whole if whole else 0.0


def figures(mode: str, samples_PK: Table, ks: Sequence[int] = ()) -> dict[str, Any]:
    """All figures of one mode, in the form of evaluation.json, evaluations.jsonl and summary.json."""
    correct_PK = correct_table(samples_PK)
    problems, k = correct_PK.shape
    avg_P, pass_P = avg_at_k(correct_PK), pass_at_k_by_problem(correct_PK, k)
    flat = [s for row in samples_PK for s in row]
    committed, generated = sum(s.tokens for s in flat), sum(s.generated for s in flat)
    erasures = sum(s.erasures for s in flat)
    right, calls = int(correct_PK.sum()), sum(s.calls for s in flat)
    chosen = reported_ks(k, ks)
    return {
        "mode": mode,
        f"avg@{k}": float(avg_P.mean()),
        f"pass@{k}": float(pass_P.mean()),
        "ci95": list(bootstrap_interval(avg_P)),
        "pass_ci95": list(bootstrap_interval(pass_P)),
        "problems": problems,
        "samples": k,
        "missing": sum(s.correct is None for s in flat),
        "tokens": generated,
        "tokens_per_correct": generated / right if right else None,
        "finish_ratio": share(sum(s.finish == "stop" for s in flat), len(flat)),
        "boxed": share(sum(s.boxed for s in flat), len(flat)),
        "length": share(committed, len(flat)),
        "erase_rate": share(erasures, erasures + sum(s.segments for s in flat)),
        "r": share(generated - committed, committed),
        **({"calls": calls / len(flat), "call_errors": sum(s.failed_calls for s in flat) / calls} if calls else {}),
        "pass": _curve(chosen, lambda n: pass_at_k_by_problem(correct_PK, n)),
        "maj": _curve(chosen, lambda n: majority(samples_PK, n)),
    }


_MEANS = ("finish_ratio", "boxed", "length", "erase_rate", "r")
_TOOLS = ("calls", "call_errors")
"""Where responses call tools: their calls, and the share of these that failed."""
_SUMS = ("problems", "missing", "tokens")


def _mean_point(points: Sequence[tuple[float, Sequence[float]]]) -> tuple[float, list[float]]:
    """The mean of independent estimates and its interval: half widths add in quadrature."""
    mean = sum(value for value, _ in points) / len(points)
    low, high = (math.hypot(*(value - bounds[side] for value, bounds in points)) / len(points) for side in (0, 1))
    return mean, [mean - low, mean + high]


def mean_figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of several benchmarks together: unweighted means over benchmarks, and sums of counts."""
    k = records[0]["samples"]

    def curve(name: str) -> dict[str, Any]:
        points = {n: [(r[name][n]["value"], r[name][n]["ci95"]) for r in records] for n in records[0][name]}
        return {n: dict(zip(("value", "ci95"), _mean_point(found), strict=True)) for n, found in points.items()}

    avg, avg_interval = _mean_point([(r[f"avg@{k}"], r["ci95"]) for r in records])
    passed, pass_interval = _mean_point([(r[f"pass@{k}"], r["pass_ci95"]) for r in records])
    right = sum(r[f"avg@{k}"] * r["problems"] * k for r in records)
    return {
        "mode": records[0]["mode"],
        f"avg@{k}": avg,
        f"pass@{k}": passed,
        "ci95": avg_interval,
        "pass_ci95": pass_interval,
        "samples": k,
        **{key: sum(r[key] for r in records) for key in _SUMS},
        "tokens_per_correct": sum(r["tokens"] for r in records) / right if right else None,
        **{
            key: sum(r[key] for r in records) / len(records)
            for key in (*_MEANS, *_TOOLS)
            if all(key in r for r in records)
        },
        "pass": curve("pass"),
        "maj": curve("maj"),
    }


def overall(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records of evaluations.jsonl for all held-out problems: those of the only source, or the mean of several."""
    return [r for r in records if r.get("data", MEAN) == MEAN]


def evaluated_name(record: Mapping[str, Any]) -> str:
    """The name of a record: its mode and, with several sources, its source."""
    return record["mode"] if record.get("data", MEAN) == MEAN else f"{record['mode']}, {record['data']}"


def equal_samples(plain_PK: Table, erasable_PK: Table) -> float:
    """The number of plain samples that cost as many tokens as a problem's erasable ones, on average; rarely whole."""
    spent = sum(s.generated for row in erasable_PK for s in row)
    one_each = sum(sum(s.generated for s in row) / len(row) for row in plain_PK)
    return spent / one_each if one_each else float(len(plain_PK[0]))


def samples_for(budget: float) -> int:
    """The number of samples to draw for an equal budget, rounded up."""
    return math.ceil(budget - 1e-9)


def _at(budget: float, values: Callable[[int], np.ndarray], problems: int) -> np.ndarray:
    """Values at a number of samples that need not be whole, [P]; 0 for no samples."""
    low = math.floor(budget + 1e-9)
    fraction = max(0.0, budget - low)
    below = values(low) if low else np.zeros(problems)
    return between(below, values(low + 1), fraction) if fraction > 1e-9 else below


def equal_budget(plain_PK: Table, erasable_PK: Table, budget: float) -> dict[str, Any]:
    """Erasable decoding against plain decoding with as many tokens: ``budget`` plain samples for each problem.

    Plain decoding gets more samples for the tokens, which changes Pass and Maj but not Avg; erasable decoding is charged
    for every token that it erased.
    """
    plain, erasable = correct_table(plain_PK), correct_table(erasable_PK)
    problems, k = erasable.shape
    pairs = {
        "avg": (avg_at_k(erasable), avg_at_k(plain)),
        "pass": (
            pass_at_k_by_problem(erasable, k),
            _at(budget, lambda n: pass_at_k_by_problem(plain, n), problems),
        ),
        "maj": (majority(erasable_PK, k), _at(budget, lambda n: majority(plain_PK, n), problems)),
    }
    return {
        "tokens_per_problem": share(sum(s.generated for row in erasable_PK for s in row), problems),
        "erasable_samples": k,
        "plain_samples": budget,
        **{
            name: {
                "erasable": float(erasable_P.mean()),
                "plain": float(plain_P.mean()),
                "plain_ci95": list(bootstrap_interval(plain_P)),
                "difference": asdict(paired_difference(erasable_P, plain_P)),
            }
            for name, (erasable_P, plain_P) in pairs.items()
        },
    }
