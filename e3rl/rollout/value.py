"""A critic that costs no forward pass: a linear head on a segment's statistics, learnt from the rewards that training has anyway.

Within a group it learns which of two siblings ended with the lower reward, segment index by segment index, by a logistic loss
on the difference of their features. Differences of U are then log odds among siblings. It starts as mean entropy + 0.3 mean ε
and returns to it where labels stop: its prior is Gaussian around any multiple of these weights, and earlier labels fade.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import Any

import numpy as np

from e3rl.types import Candidate, RewardedGroup

FEATURES: Mapping[str, float] = {
    "mean entropy": 1.0,
    "mean ε": 0.3,
    "largest entropy": 0.0,
    "last entropy": 0.0,
    "largest ε": 0.0,
    "mean −log p": 0.0,
    "log of the largest rank": 0.0,
    "log of its tokens": 0.0,
    "log of its place, from 1": 0.0,
    "mean entropy of the segments before": 0.0,
    "ends the response": 0.0,
}
"""What a segment is judged by, at its end, and the weight of each before anything is learnt."""

_PRIOR_F = np.array([*FEATURES.values()])
STRENGTH = 10.0
"""Precision of the prior across its weights: a pair at even odds, one apart in a feature, adds a quarter."""
_PRIOR_FF = np.linalg.inv(np.eye(len(_PRIOR_F)) / STRENGTH + 100 * np.outer(_PRIOR_F, _PRIOR_F))
"""Along its weights it is next to nothing: log odds may be any multiple of entropy + 0.3 ε."""
KEPT = 0.98
"""Share of what was learnt that an update keeps; the prior takes the rest."""
_NEWTON_STEPS = 20


def features(candidate: Candidate, history: Sequence[float]) -> list[float]:
    """`FEATURES` of a candidate behind segments whose mean entropies are ``history``."""
    entropies, perturbations, logprobs = candidate.entropies, candidate.perturbations, candidate.logprobs
    return [
        float(entropies.mean()),
        float(perturbations.mean()),
        float(entropies.max()),
        float(entropies[-1]),
        float(perturbations.max()),
        -float(logprobs.mean()),
        math.log(max(int(candidate.ranks.max()), 1)),
        math.log(len(candidate.ids)),
        math.log(1 + len(history)),
        fmean(history) if history else 0.0,
        float(candidate.ended),
    ]


@dataclass(frozen=True)
class ValueHead:
    """What the critic knows after ``version`` updates, in float64. JSON keeps every bit of it.

    ``responses``, ``right`` and ``tokens`` are sums over the graded responses so far that fade as labels do; so is
    ``segments``, over which ``centre`` is the mean of the features. ``lift``: three standard deviations of what was learnt, over
    the latest step's segments.
    """

    version: int = 0
    weights: tuple[float, ...] = tuple(_PRIOR_F.tolist())
    precision: tuple[tuple[float, ...], ...] = tuple(map(tuple, _PRIOR_FF.tolist()))
    centre: tuple[float, ...] = (0.0,) * len(_PRIOR_F)
    lift: float = 0.0
    segments: float = 0.0
    responses: float = 0.0
    right: float = 0.0
    tokens: float = 0.0

    def suspicion(self, features_F: Sequence[float]) -> float:
        """U: mean entropy + 0.3 mean ε and what was learnt on top, lifted so that it is hardly ever cut off at 0."""
        each = zip(self.weights, PRIOR.weights, features_F, self.centre, strict=True)
        return max(math.fsum(p * x + (w - p) * (x - c) for w, p, x, c in each) + self.lift, 0.0)

    @property
    def usual(self) -> float:
        """The mean of U."""
        return math.fsum(p * c for p, c in zip(PRIOR.weights, self.centre, strict=True)) + self.lift

    def taught(self, groups: Iterable[RewardedGroup]) -> ValueHead:
        """The head after one more update, by the groups of a step."""
        differences, weights, seen = [np.empty((0, len(FEATURES)))], [np.empty(0)], [np.empty((0, len(FEATURES)))]
        responses = right = tokens = 0.0
        for item in groups:
            for trajectory, reward in zip(item.group.trajectories, item.rewards, strict=True):
                if reward.value is not None:
                    responses, right = responses + 1, right + float(bool(reward.right))
                    tokens += trajectory.committed_tokens
            for rows_GF, rewards_G in by_place(item):
                pairs_PF, weights_P = pairs(rows_GF, rewards_G)
                differences.append(pairs_PF)
                weights.append(weights_P)
                seen.append(rows_GF)
        if not responses:
            return self
        seen_KF = np.concatenate(seen)
        segments = KEPT * self.segments + len(seen_KF)
        centre_F = (KEPT * self.segments * np.array(self.centre) + seen_KF.sum(0)) / max(segments, 1)
        weights_F, precision_FF = _updated(self, np.concatenate(differences), np.concatenate(weights))
        lift = 3 * float(_product(seen_KF, weights_F - _PRIOR_F).std())
        return ValueHead(
            self.version + 1,
            tuple(weights_F.tolist()),
            tuple(map(tuple, precision_FF.tolist())),
            tuple(centre_F.tolist()),
            lift,
            segments,
            KEPT * self.responses + responses,
            KEPT * self.right + right,
            KEPT * self.tokens + tokens,
        )

    def to_table(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"features": list(FEATURES), **asdict(self)}

    @staticmethod
    def from_table(table: Mapping[str, Any]) -> ValueHead:
        """What `to_table` gave; KeyError, TypeError or ValueError where the table can't have come from it."""
        if table["features"] != list(FEATURES):
            raise ValueError("the critic was learnt on other features than this version has")
        numbers = {f.name: float(table[f.name]) for f in fields(ValueHead) if f.type == "float"}
        weights, centre = (tuple(map(float, table[name])) for name in ("weights", "centre"))
        precision = tuple(tuple(map(float, row)) for row in table["precision"])
        size = len(FEATURES)
        if [len(weights), len(centre), *map(len, precision)] != [size] * (size + 2):
            raise ValueError("a critic of another size than its features")
        if not np.isfinite([*weights, *centre, *itertools.chain(*precision), *numbers.values()]).all():
            raise ValueError("a critic with numbers that are not finite")
        return ValueHead(int(table["version"]), weights, precision, centre, **numbers)


PRIOR = ValueHead()
"""The critic that has learnt nothing: U is mean entropy + 0.3 mean ε."""


def by_place(item: RewardedGroup) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Features and rewards of the graded siblings' committed segments, by segment index."""
    found: dict[int, list[tuple[list[float], float]]] = {}
    for trajectory, reward in zip(item.group.trajectories, item.rewards, strict=True):
        if reward.value is None:
            continue
        history: list[float] = []
        for segment in trajectory.drawn_segments:
            found.setdefault(len(history), []).append((features(segment.candidate, history), reward.value))
            history.append(fmean(segment.candidate.entropies.tolist()))
    for place in sorted(found):
        yield np.array([row for row, _ in found[place]]), np.array([value for _, value in found[place]])


def pairs(rows_GF: np.ndarray, rewards_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features of the sibling with the lower reward less those of the other, and a pair's weight: 2 / G, so that b bad and g
    good siblings count as their harmonic mean."""
    worse, better = np.nonzero(rewards_G[:, None] < rewards_G[None, :])
    return rows_GF[worse] - rows_GF[better], np.full(len(worse), 2 / len(rewards_G))


def _updated(head: ValueHead, pairs_PF: np.ndarray, weights_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and precision of the weights behind what the head knew, faded, and these pairs (Laplace's approximation)."""
    known_FF, prior_FF = KEPT * np.array(head.precision), (1 - KEPT) * _PRIOR_FF
    before_FF = known_FF + prior_FF
    mean_F = np.linalg.solve(before_FF, _product(known_FF, np.array(head.weights)) + _product(prior_FF, _PRIOR_F))
    at_F = mean_F
    for _ in range(_NEWTON_STEPS):
        slope_F, curvature_FF = _derivatives(at_F, mean_F, before_FF, pairs_PF, weights_P)
        at_F, step = _descend(at_F, np.linalg.solve(curvature_FF, slope_F), mean_F, before_FF, pairs_PF, weights_P)
        if step < 1e-12:
            break
    return at_F, _derivatives(at_F, mean_F, before_FF, pairs_PF, weights_P)[1]


def loss(
    at_F: np.ndarray, mean_F: np.ndarray, before_FF: np.ndarray, pairs_PF: np.ndarray, weights_P: np.ndarray
) -> float:
    """Half the squared distance from what was known, in its precision, and the pairs' logistic loss."""
    away_F = at_F - mean_F
    pairwise_P = np.logaddexp(0.0, -_product(pairs_PF, at_F))
    return float(0.5 * (away_F * _product(before_FF, away_F)).sum() + (weights_P * pairwise_P).sum())


def _derivatives(
    at_F: np.ndarray, mean_F: np.ndarray, before_FF: np.ndarray, pairs_PF: np.ndarray, weights_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    missed_P = 1 / (1 + np.exp(np.clip(_product(pairs_PF, at_F), -500, 500)))
    slope_F = _product(before_FF, at_F - mean_F) - np.einsum("p,pf->f", weights_P * missed_P, pairs_PF)
    bent_P = weights_P * missed_P * (1 - missed_P)
    return slope_F, before_FF + np.einsum("p,pf,pg->fg", bent_P, pairs_PF, pairs_PF)


def _descend(at_F: np.ndarray, step_F: np.ndarray, *rest: np.ndarray) -> tuple[np.ndarray, float]:
    """The point after a Newton step, halved until the loss does not rise, and the step's largest part."""
    now = loss(at_F, *rest)
    for _ in range(30):
        if loss(at_F - step_F, *rest) <= now:
            return at_F - step_F, float(np.abs(step_F).max())
        step_F = step_F / 2
    return at_F, 0.0


def _product(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Their product, summed in an order that depends on no number of threads."""
    return np.einsum("kf,f->k", matrix, vector)
