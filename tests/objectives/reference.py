"""The objectives once more, in plain Python numbers and loops, sharing no code with the library.

A sequence is a dict of lists, one number per real token (logp, old, ref, segment, advantage, entropy, share), and of
scalars.
"""

from __future__ import annotations

import functools
import math
from typing import Any

Sequence = dict[str, Any]
together = functools.partial(zip, strict=True)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def population_std(values: list[float]) -> float:
    centre = mean(values)
    return math.sqrt(mean([(v - centre) ** 2 for v in values]))


def sample_std(values: list[float]) -> float:
    centre = mean(values)
    return math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1))


def group_advantages(rewards: list[float], eps: float) -> list[float]:
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    return [(r - mean(rewards)) / (sample_std(rewards) + eps) for r in rewards]


def surrogate(ratio: float, advantage: float, low: float, high: float) -> float:
    held = min(max(ratio, low), high)
    return min(ratio * advantage, held * advantage)


def k3(logp: float, ref: float) -> float:
    return math.exp(ref - logp) - (ref - logp) - 1


def e3rl_advantages(group: list[Sequence], rewards: list[float], allocation: str, eps: float) -> list[list[float]]:
    """Per sibling, per token."""
    most = max(max(s["segment"]) for s in group) + 1
    shares = [[sum(a for a, n in together(s["share"], s["segment"]) if n == m) for m in range(most)] for s in group]
    spread = population_std(rewards)
    whole = [(r - mean(rewards)) / (spread + eps) for r in rewards]
    result = []
    for i, sequence in enumerate(group):
        row = []
        for n in sequence["segment"]:
            column = [r * share[n] for r, share in together(rewards, shares)]
            if allocation == "causal":
                row.append((column[i] - mean(column)) / (population_std(column) + eps))
            elif allocation == "sequence":
                row.append(whole[i])
            else:
                row.append(whole[i] * (max(sequence["segment"]) + 1) * shares[i][n])
        result.append(row)
    return result


def e3rl_loss(
    sequences: list[Sequence], groups: int, kl_coef: float, low: float, high: float, ratio: str = "segment"
) -> float:
    """Minus eq 21; a sequence's ``group_size`` says how many siblings it shares its group with."""
    total = 0.0
    for s in sequences:
        objective = 0.0
        for n in sorted(set(s["segment"])):
            tokens = [t for t, m in enumerate(s["segment"]) if m == n]
            log_ratio = sum(s["logp"][t] - s["old"][t] for t in tokens)
            if ratio == "segment_mean":
                log_ratio /= len(tokens)
            objective += surrogate(math.exp(log_ratio), s["advantage"][tokens[0]], 1 - low, 1 + high)
        if not s.get("erased", False):
            objective -= kl_coef * sum(k3(p, q) for p, q in together(s["logp"], s["ref"]))
        total -= objective / (groups * s["group_size"])
    return total


def token_objectives(sequences: list[Sequence], low: float, high: float, kl_coef: float) -> list[list[float]]:
    return [
        [
            surrogate(math.exp(p - o), a, low, high) - (kl_coef * k3(p, q) if kl_coef else 0.0)
            for p, o, q, a in together(s["logp"], s["old"], s["ref"], s["advantage"])
        ]
        for s in sequences
    ]


def capped_mean_loss(sequences: list[Sequence], low: float, high: float, kl_coef: float, cap: float) -> float:
    """Ratios at most ``cap``, a KL term that is multiplied by the ratio as it is; mean over tokens."""
    values = []
    for s in sequences:
        for p, o, q, a in together(s["logp"], s["old"], s["ref"], s["advantage"]):
            ratio = math.exp(p - o)
            held = min(max(ratio, low), high)
            values.append(min(min(ratio, cap) * a, held * a) - kl_coef * ratio * k3(p, q))
    return -mean(values)


def token_mean_loss(sequences: list[Sequence], low: float, high: float, kl_coef: float) -> float:
    return -mean([x for row in token_objectives(sequences, low, high, kl_coef) for x in row])


def sequence_mean_loss(sequences: list[Sequence], low: float, high: float, kl_coef: float) -> float:
    return -mean([mean(row) for row in token_objectives(sequences, low, high, kl_coef)])


def limit_loss(sequences: list[Sequence], low: float, high: float, kl_coef: float, limit: int) -> float:
    summed = sum(x for row in token_objectives(sequences, low, high, kl_coef) for x in row)
    return -summed / (len(sequences) * limit)


def gspo_loss(sequences: list[Sequence], low: float, high: float, kl_coef: float) -> float:
    values = []
    for s in sequences:
        ratio = math.exp(mean([p - o for p, o in together(s["logp"], s["old"])]))
        kl = mean([k3(p, q) for p, q in together(s["logp"], s["ref"])])
        values.append(surrogate(ratio, s["advantage"][0], low, high) - kl_coef * kl)
    return -mean(values)


def sapo_loss(sequences: list[Sequence], positive: float, negative: float) -> float:
    values = []
    for s in sequences:
        row = []
        for p, o, a in together(s["logp"], s["old"], s["advantage"]):
            tau = positive if a > 0 else negative
            row.append(4 / tau / (1 + math.exp(-tau * (math.exp(p - o) - 1))) * a)
        values.append(mean(row))
    return -mean(values)


def cispo_loss(sequences: list[Sequence], cap: float, kl_coef: float) -> float:
    values = []
    for s in sequences:
        for p, o, r, a in together(s["logp"], s["old"], s["ref"], s["advantage"]):
            values.append(min(math.exp(p - o), cap) * a * p - kl_coef * (math.exp(r - p) - (r - p) - 1))
    return -mean(values)


def rloo_advantages(group: list[Sequence], rewards: list[float], kl_coef: float) -> list[float]:
    """Each reward, less the weighted log-ratio to the reference, against the mean of the others'."""
    whole = [r - kl_coef * sum(o - q for o, q in together(s["old"], s["ref"])) for r, s in together(rewards, group)]
    return [r - mean(whole[:i] + whole[i + 1 :]) for i, r in enumerate(whole)]


def rloo_loss(sequences: list[Sequence], low: float, high: float) -> float:
    whole = [math.exp(sum(p - o for p, o in together(s["logp"], s["old"]))) for s in sequences]
    return -mean([surrogate(ratio, s["advantage"][0], low, high) for ratio, s in together(whole, sequences)])


def luspo_loss(sequences: list[Sequence], low: float, high: float, kl_coef: float) -> float:
    values = []
    for s in sequences:
        ratio = math.exp(mean([p - o for p, o in together(s["logp"], s["old"])]))
        kl = sum(k3(p, q) for p, q in together(s["logp"], s["ref"]))
        values.append(len(s["logp"]) * surrogate(ratio, s["advantage"][0], low, high) - kl_coef * kl)
    return -mean(values)


def vespo_loss(sequences: list[Sequence], kl_coef: float) -> float:
    values = []
    for s in sequences:
        w = math.exp(sum(p - o for p, o in together(s["logp"], s["old"])))
        for p, q, a in together(s["logp"], s["ref"], s["advantage"]):
            k, decay = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
            values.append(math.exp(decay) * w**k * math.exp(-decay * w) * a * p - kl_coef * k3(p, q))
    return -mean(values)


def erpo_advantages(group: list[Sequence], rewards: list[float], o: dict[str, float]) -> list[list[float]]:
    """Algorithm 1, lines 3-14, token by token. ``o``: gamma, buckets, beta_progress, sigma_target, eta, eps."""
    eps = o["eps"]
    whole = group_advantages(rewards, eps)
    entropies = [h for s in group for h in s["entropy"]]
    centre, spread = mean(entropies), population_std(entropies)
    buckets: dict[int, list[float]] = {}
    placed = []
    for s in group:
        row = []
        for t, (p, q) in enumerate(together(s["old"], s["ref"])):
            k, signal = math.floor(t / len(s["old"]) * o["buckets"] + 1e-12), o["beta_progress"] * (p - q)
            buckets.setdefault(k, []).append(signal)
            row.append((k, signal))
        placed.append(row)
    raw = []
    for s, row, a in together(group, placed, whole):
        sign = (a > 0) - (a < 0)
        gates = [1 / (1 + math.exp(-o["gamma"] * (h - centre) / (spread + eps))) for h in s["entropy"]]
        relative = [(x - mean(buckets[k])) / (population_std(buckets[k]) + eps) for k, x in row]
        raw.append([w * sign * x for w, x in together(gates, relative)])
    active = [x for row, a in together(raw, whole) if a != 0 for x in row]
    if not active:
        return [[0.0] * len(row) for row in raw]
    scale = o["sigma_target"] / (population_std(active) + eps)
    mixed = [[a + o["eta"] * scale * x for x in row] for row, a in together(raw, whole)]
    everything = [x for row in mixed for x in row]
    return [[(x - mean(everything)) / (population_std(everything) + eps) for x in row] for row in mixed]


def bapo_bounds(sequences: list[Sequence], target: float) -> tuple[float, float]:
    """Algorithm 1 with the paper's ranges and steps: c_high from 1.2 to 3.0, then c_low from 0.6 to 0.9."""
    low, high = 0.6, 1.2
    while True:
        up = down = 0.0
        for s in sequences:
            for p, o, a in together(s["logp"], s["old"], s["advantage"]):
                value = surrogate(math.exp(p - o), a, low, high)
                up, down = up + max(value, 0.0), down + max(-value, 0.0)
        if up + down > 0 and up / (up + down) >= target:
            return low, high
        if high + 0.05 <= 3.0 + 1e-9:
            high += 0.05
        elif low + 0.02 <= 0.9 + 1e-9:
            low += 0.02
        else:
            return low, high


def disco_advantages(group: list[Sequence], rewards: list[float], tau: float, score: str) -> list[float]:
    right = [r > 0 for r in rewards]
    if all(right) or not any(right):
        return [0.0] * len(group)
    scores = [mean(s["old"]) if score == "log_likelihood" else 1.0 for s in group]
    powers = [math.exp(x / tau) for x in scores]
    wrong = sum(w for w, r in together(powers, right) if not r)
    return [1 / sum(right) if r else -w / wrong for w, r in together(powers, right)]


def disco_loss(sequences: list[Sequence], groups: int, score: str, limit: float, weight: float) -> float:
    total = 0.0
    for s in sequences:
        tokens = s["logp"] if score == "log_likelihood" else [math.exp(p - o) for p, o in together(s["logp"], s["old"])]
        kl = mean([math.exp(p - o) - (p - o) - 1 for p, o in together(s["logp"], s["old"])])
        total -= s["advantage"][0] * mean(tokens) / groups
        total += 0.5 * weight * max(kl - limit, 0.0) ** 2 / len(sequences)
    return total
