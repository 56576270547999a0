"""Avg@k, Pass@k, Maj@k, their uncertainty, and paired comparison. A result is a table of booleans: problems by samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""The k of Pass@k and Maj@k that are reported, as far as there are samples."""

_SUBSETS = 200  # random draws of k answers that approximate all of them in Maj@k
_EXACT = 16  # up to this many differing problems, all changes of sign are tried
_FLIPS = 20_000


def avg_at_k(correct_PK: np.ndarray) -> np.ndarray:
    """Share of each problem's samples that are right, [P]."""
    return correct_PK.mean(axis=1)


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Unbiased chance that at least one of k samples, drawn without replacement from these, is right."""
    if not 1 <= k <= samples:
        raise ValueError(f"Pass@{k} needs at least {k} samples, there are {samples}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def pass_at_k_by_problem(correct_PK: np.ndarray, k: int) -> np.ndarray:
    """Pass@k of every problem, [P]."""
    samples = correct_PK.shape[1]
    return np.array([pass_at_k(int(c), samples, k) for c in correct_PK.sum(axis=1)])


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int, *, seed: int = 0) -> float:
    """Chance that the commonest of k answers, drawn from one problem's samples, is right; answers are equal if spelled the same.

    Equally common answers share the vote evenly; a sample without an answer has none. Exact for k = 1 and for all
    samples; otherwise the mean over random draws.
    """
    samples = len(answers)
    if not 1 <= k <= samples:
        raise ValueError(f"Maj@{k} needs at least {k} samples, there are {samples}")
    names = sorted({a for a in answers if a is not None})
    if not names:
        return 0.0
    number = {name: i for i, name in enumerate(names)}
    code_K = np.array([len(names) if a is None else number[a] for a in answers])
    right_K = np.array(correct, dtype=float)
    share_A = np.array([right_K[code_K == i].mean() for i in range(len(names))])
    if k == 1:
        return float((right_K * (code_K < len(names))).mean())
    rng = np.random.Generator(np.random.Philox(seed))
    draws = [np.arange(samples)] if k == samples else [rng.permutation(samples)[:k] for _ in range(_SUBSETS)]
    return float(_votes(code_K[np.stack(draws)], share_A).mean())


def _votes(code_DK: np.ndarray, share_A: np.ndarray) -> np.ndarray:
    """Share of right winners of each draw; samples without an answer have the code one past the last."""
    draws, names = len(code_DK), len(share_A)
    places = code_DK + (names + 1) * np.arange(draws)[:, None]
    counts_DA = np.bincount(places.ravel(), minlength=draws * (names + 1)).reshape(draws, -1)[:, :names]
    winners_DA = (counts_DA == counts_DA.max(axis=1, keepdims=True)) & (counts_DA > 0)
    return (winners_DA @ share_A) / np.maximum(winners_DA.sum(axis=1), 1)


def between(below: np.ndarray, above: np.ndarray, fraction: float) -> np.ndarray:
    """The values ``fraction`` of the way from k samples to k + 1, for a budget that is not a whole number of samples."""
    return (1 - fraction) * below + fraction * above


def bootstrap_interval(
    values_P: np.ndarray, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean: problems are drawn with replacement."""
    chosen = np.random.Generator(np.random.Philox(seed)).integers(0, len(values_P), (resamples, len(values_P)))
    low, high = np.quantile(values_P[chosen].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """``a`` minus ``b`` on the same problems: the mean, its interval over problems, and the p-value of no difference."""

    mean: float
    interval: tuple[float, float]
    p: float
    problems: int


def paired_difference(a_P: np.ndarray, b_P: np.ndarray, *, seed: int = 0) -> Difference:
    """Two-sided paired randomisation test: without a difference, every problem's sign is random.

    If few problems differ, all signs are tried, else random ones; the observed outcome counts as one of them, so that p is
    never 0.
    """
    if a_P.shape != b_P.shape or not len(a_P):
        raise ValueError("a paired comparison needs the same problems on both sides, and at least one")
    d_P = np.asarray(a_P, dtype=float) - np.asarray(b_P, dtype=float)
    return Difference(float(d_P.mean()), bootstrap_interval(d_P, seed=seed), _sign_test(d_P[d_P != 0], seed), len(d_P))


def _sign_test(d_P: np.ndarray, seed: int) -> float:
    observed = abs(d_P.sum()) - 1e-12
    if len(d_P) <= _EXACT:
        signs = 1 - 2 * ((np.arange(2 ** len(d_P))[:, None] >> np.arange(len(d_P))) & 1)
        return float((np.abs(signs @ d_P) >= observed).mean())
    rng = np.random.Generator(np.random.Philox(seed))
    sums = np.concatenate([rng.choice((-1.0, 1.0), (2000, len(d_P))) @ d_P for _ in range(_FLIPS // 2000)])
    return float((1 + (np.abs(sums) >= observed).sum()) / (1 + len(sums)))
