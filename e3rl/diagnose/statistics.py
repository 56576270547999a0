"""How well a number separates wrong from right, overall and among draws from the same prefix, with intervals over problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 400


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % bootstrap interval over problems. ``count``: number of observations or pairs."""

    value: float | None
    low: float | None
    high: float | None
    count: int


UNKNOWN = Estimate(None, None, None, 0)


def auroc(scores: np.ndarray, wrong: np.ndarray) -> float:
    """Chance that a wrong one scores above a right one, ties counted half; NaN where either kind is missing."""
    bad, good = int(wrong.sum()), int((~wrong).sum())
    if not bad or not good:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    upto = np.cumsum(counts)
    ranks = (upto - (counts - 1) / 2)[inverse]  # mean rank of equal scores
    return float((ranks[wrong].sum() - bad * (bad + 1) / 2) / (bad * good))


def wins_and_pairs(scores: np.ndarray, wrong: np.ndarray) -> tuple[float, int]:
    """Among draws from one prefix: wrong-right pairs where the wrong one scores higher (ties half), and all such pairs."""
    bad, good = scores[wrong], scores[~wrong]
    difference = bad[:, None] - good[None, :]
    return float((difference > 0).sum() + 0.5 * (difference == 0).sum()), difference.size


def resampled(problems: int, seed: int) -> np.ndarray:
    """Problems drawn with replacement, [resamples, P]."""
    return np.random.Generator(np.random.Philox(seed)).integers(0, problems, (RESAMPLES, problems))


def _interval(values: Sequence[float] | np.ndarray) -> tuple[float | None, float | None]:
    finite = np.asarray(values)[np.isfinite(values)]
    if len(finite) < RESAMPLES // 2:
        return None, None
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)


def overall_auroc(scores: np.ndarray, wrong: np.ndarray, problem: np.ndarray, seed: int = 0) -> Estimate:
    """AUROC over all observations; the interval resamples whole problems."""
    value = auroc(scores, wrong)
    if np.isnan(value):
        return UNKNOWN
    names = np.unique(problem)
    members = [np.flatnonzero(problem == name) for name in names]
    chosen = [np.concatenate([members[i] for i in row]) for row in resampled(len(names), seed)]
    low, high = _interval([auroc(scores[index], wrong[index]) for index in chosen])
    return Estimate(value, low, high, len(scores))


def within_prefix_auroc(
    scores: np.ndarray, wrong: np.ndarray, prefix: np.ndarray, problem: np.ndarray, seed: int = 0
) -> Estimate:
    """Share of wrong-right pairs from the same prefix that the score puts in order."""
    wins, pairs = dict.fromkeys(np.unique(problem), 0.0), dict.fromkeys(np.unique(problem), 0)
    for name in np.unique(prefix):
        index = np.flatnonzero(prefix == name)
        won, compared = wins_and_pairs(scores[index], wrong[index])
        wins[problem[index[0]]] += won
        pairs[problem[index[0]]] += compared
    wins_P, pairs_P = np.array(list(wins.values())), np.array(list(pairs.values()))
    if not pairs_P.sum():
        return UNKNOWN
    rows = resampled(len(wins_P), seed)
    with np.errstate(invalid="ignore"):
        low, high = _interval(wins_P[rows].sum(axis=1) / pairs_P[rows].sum(axis=1))
    return Estimate(float(wins_P.sum() / pairs_P.sum()), low, high, int(pairs_P.sum()))


def mean_by_problem(values: np.ndarray, problem: np.ndarray, seed: int = 0) -> Estimate:
    """Mean over all values; the interval resamples whole problems."""
    if not len(values):
        return UNKNOWN
    names, inverse = np.unique(problem, return_inverse=True)
    sums_P = np.bincount(inverse, values, len(names))
    counts_P = np.bincount(inverse, minlength=len(names))
    rows = resampled(len(names), seed)
    low, high = _interval(sums_P[rows].sum(axis=1) / counts_P[rows].sum(axis=1))
    return Estimate(float(values.mean()), low, high, len(values))


def safe_threshold(
    scores: np.ndarray, worth: np.ndarray, problem: np.ndarray, edges: Sequence[float], confidence: float = 0.95
) -> float | None:
    """The edge above which redrawing is worth most, of those above which it is surely worth anything; None where it is nowhere.

    ``worth``: what redrawing gains in right answers, less what its tokens give plainly. Surely: the lower bound of its sum above
    the edge is above 0 for all edges together (Bonferroni), by Student's t over problems. So erasing above it yields less per
    token than plain decoding with a probability of at most 1 - ``confidence``.
    """
    names, inverse = np.unique(problem, return_inverse=True)
    level = 1 - (1 - confidence) / max(len(edges), 1)
    found: dict[float, float] = {}
    for edge in edges if len(names) > 1 else ():
        gained_P = np.bincount(inverse, worth * (scores > edge), len(names))
        error = float(gained_P.std(ddof=1)) / len(names) ** 0.5
        mean = float(gained_P.mean())
        if mean > 0 and mean - student_quantile(level, len(names) - 1) * error > 0:
            found[float(edge)] = mean
    return max(found, key=found.__getitem__, default=None)


def student_quantile(level: float, degrees: int) -> float:
    """Quantile of Student's t by expansion around the normal one's: within 1 % from 5 degrees of freedom on."""
    z = NormalDist().inv_cdf(level)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / degrees ** (n + 1) for n, term in enumerate(terms))


@dataclass(frozen=True, slots=True)
class Yield:
    """What a token of erasing rollouts teaches over what one of plain rollouts does. ``r``: erased tokens for each kept one."""

    ratio: float
    r: float


def erasing_yield(success: float, segments: float, auroc: float, max_erasures: int = 5) -> Yield:
    """Var_q/(1 + r) over Var_π, summed over segments: erasing in training can pay at equal tokens only where it is above 1.

    The model behind it: a response of equal segments is right if each is, one mistake can't be mended, and the judge's U is
    Gaussian with this AUROC among draws from one prefix, its threshold where both kinds of error are equally frequent. The
    variance is that of the chance to end rightly, over the segment that comes next.
    """
    normal, count = NormalDist(), max(round(segments), 1)
    right = min(max(success, 0.001), 0.999) ** (1 / count)
    seen = normal.cdf(
        normal.inv_cdf(min(max(auroc, 0.001), 0.999)) / 2**0.5
    )  # share of each kind that is judged rightly
    erased = right * (1 - seen) + (1 - right) * seen
    spent = erased ** (max_erasures + 1)
    kept = right * seen * (1 - spent) / (1 - erased) + right * (1 - seen) * spent / erased
    r = sum(erased**k for k in range(1, max_erasures + 1))
    return Yield(_spread(kept, count) / ((1 + r) * _spread(right, count)), r)


def _spread(right: float, segments: int) -> float:
    """Variance over the next segment of the chance to end rightly, summed over the segments that are reached."""
    return sum(right**n * right * (1 - right) * right ** (2 * (segments - 1 - n)) for n in range(segments))


def highest_success(segments: float, auroc: float) -> float:
    """The success rate above which erasing in training can't pay by `erasing_yield`; 0 where it never can."""
    rates = (n / 1000 for n in range(1, 1000))
    return max((rate for rate in rates if erasing_yield(rate, segments, auroc).ratio > 1), default=0.0)
