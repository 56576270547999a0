"""The equations once more, slowly: plain Python lists and the math module, sharing nothing with the library."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

Floats = Sequence[float]


def mean(values: Floats) -> float:
    return math.fsum(values) / len(values)


def deviation(values: Floats) -> float:
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / len(values))


def probabilities(logits: Floats) -> list[float]:
    peak = max(logits)
    exponentials = [math.exp(x - peak) for x in logits]
    return [e / math.fsum(exponentials) for e in exponentials]


def token_distribution(hidden: Floats, embeddings: Sequence[Floats], temperature: float) -> list[float]:
    return probabilities([sum(h * e for h, e in zip(hidden, row, strict=True)) / temperature for row in embeddings])


def log_total(logits: Floats) -> float:
    return math.log(math.fsum(math.exp(x) for x in logits))


def perturbation(logits: Floats, sampled: int) -> float:
    return max(logits) - logits[sampled]


def token_entropy(logits: Floats) -> float:
    return math.fsum(-p * math.log(p) for p in probabilities(logits) if p > 0)


def smooth(means: Floats, n: int, decay: float, window: int, last: int) -> float:
    """H~_n over the segments 0..last that lie within ``window`` of n."""
    total = norm = 0.0
    for w in range(-window, window + 1):
        if 0 <= n + w <= last:
            total += decay ** abs(w) * means[n + w]
            norm += decay ** abs(w)
    return total / norm


def entropy_variation(entropies: Floats) -> float:
    if len(entropies) == 1:
        return 0.0
    return mean([abs(b - a) for a, b in itertools.pairwise(entropies)])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def offset(std: float, kappa0: float, kappa1: float, sigma0: float) -> float:
    return kappa0 + kappa1 * math.tanh((std - sigma0) / (sigma0 + 1e-6))


def modulation(smoothed: Floats, baselines: Floats, rho: float) -> float:
    excess = [(h - b) / (b + 1e-6) for h, b in zip(smoothed, baselines, strict=True)]
    return 1 + rho * math.tanh(mean(excess))


def threshold(
    values: Floats, attempt: int, phi: float, kappas: tuple[float, float, float], eta: float, delta: float
) -> float:
    """Eq 14-17 in one go, from the siblings' uncertainties."""
    spread = deviation(values)
    baseline = mean(values) + offset(spread, *kappas) * spread
    return baseline * math.exp(eta * attempt**delta) * phi


def by_segment(values: Floats, segments: Sequence[int], n: int) -> list[float]:
    return [v for v, s in zip(values, segments, strict=True) if s == n]


def segment_rewards(reward: float, attention: Sequence[Floats], segments: Sequence[int], count: int) -> list[float]:
    """Eq 19 from the attention rows of the last queries."""
    paid = [mean(column) for column in zip(*attention, strict=True)]
    whole = math.fsum(a for a, s in zip(paid, segments, strict=True) if s >= 0)
    return [reward * math.fsum(by_segment(paid, segments, n)) / whole for n in range(count)]


def advantages(rewards: Floats, eps: float) -> list[float]:
    return [(r - mean(rewards)) / (deviation(rewards) + eps) for r in rewards]


def surrogate(ratio: float, advantage: float, low: float, high: float) -> float:
    clipped = max(1 - low, min(1 + high, ratio))
    return min(ratio * advantage, clipped * advantage)


def k3(logprob: float, reference: float) -> float:
    return math.exp(reference - logprob) - (reference - logprob) - 1


def objective(
    logprobs: Sequence[Floats],
    old: Sequence[Floats],
    reference: Sequence[Floats],
    segments: Sequence[Sequence[int]],
    advantages: Sequence[Floats],
    low: float,
    high: float,
    kl_coef: float,
) -> float:
    total = 0.0
    for i, row in enumerate(segments):
        for n in range(max(row) + 1):
            new_p = math.prod(math.exp(x) for x in by_segment(logprobs[i], row, n))
            old_p = math.prod(math.exp(x) for x in by_segment(old[i], row, n))
            total += surrogate(new_p / old_p, advantages[i][n], low, high)
        for t, n in enumerate(row):
            if n >= 0:
                total -= kl_coef * k3(logprobs[i][t], reference[i][t])
    return total / len(segments)
