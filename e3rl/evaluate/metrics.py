"""Avg@k, Pass@k and their uncertainty. A result is a table of booleans: problems by samples."""

from __future__ import annotations

import math

import numpy as np


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


def bootstrap_interval(
    values_P: np.ndarray, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean over problems, by drawing problems with replacement."""
    chosen = np.random.Generator(np.random.Philox(seed)).integers(0, len(values_P), (resamples, len(values_P)))
    low, high = np.quantile(values_P[chosen].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
