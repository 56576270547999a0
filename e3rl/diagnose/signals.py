"""The signals of a segment at the time of judging: each term of U, what U leaves out, and combinations.

The larger a signal, the more suspicious the segment. Late signals look at the segment that follows (eq 11 read on both
sides): they are known only after a further segment was generated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from e3rl.config import ErasureConfig
from e3rl.equations.uncertainty import length_weight
from e3rl.rollout.metric import e3rl_uncertainty
from e3rl.rollout.moments import Moments
from e3rl.types import Candidate, Trajectory

PAPER = ErasureConfig()
_UNIT = replace(PAPER, base_weight=1.0, gradient_weight=1.0, extremum_weight=1.0, perturbation_weight=1.0)

SIGNALS: Mapping[str, str] = {
    "entropy": "smoothed mean entropy (eq 11): U's base term",
    "entropy step": "mean step of the entropy (eq 12): U's gradient term",
    "entropy peak": "largest entropy against the group's (eq 13): U's extremum term",
    "U, paper": "eq 13 with the default weights, without ε",
    "ε, mean": "mean perturbation (eq 5), which the paper's U leaves out",
    "ε, largest": "largest perturbation in the segment",
    "cross-entropy": "mean of −log p of the sampled tokens",
    "surprise": "cross-entropy minus entropy: ε's sibling without the argmax",
    "U + ε": "eq 13 with the perturbation at weight 1",
    "entropy after": "mean entropy of the next segment (late)",
    "ε after": "mean perturbation of the next segment (late)",
}
LATE = frozenset({"entropy after", "ε after"})

LATE_EPS_WEIGHT = 0.3
"""Weight of ε beside entropy if a whole response is judged: best of 0, 0.1, … 1 on training problems of two graph families."""

LENGTH_EXPONENT = 0.5
"""`erasure.length_exponent` if long answers are suspicious: best of 0, ½ and 1 on training problems of a verbose model."""

RESPONSE_SIGNALS: Mapping[str, tuple[str, Callable[[Trajectory], float]]] = {
    "entropy of the response": ("mean entropy over all its tokens", lambda t: _mean(t.entropies)),
    "ε of the response": ("mean perturbation over all its tokens", lambda t: _mean_perturbation(t)),
    "entropy + 0.3 ε": ("both, as the setting whole+eps weighs them", lambda t: late_suspicion(t)),
    "entropy + 0.3 ε, by length": (
        "times the root of its tokens, as the setting whole+eps+length weighs them",
        lambda t: late_suspicion(t, LENGTH_EXPONENT),
    ),
    "cross-entropy of the response": ("mean of −log p over all its tokens", lambda t: -_mean(t.logprobs)),
}
"""The signals of a whole response."""


def late_suspicion(trajectory: Trajectory, length_exponent: float = 0.0) -> float:
    """The best signal for whole responses: their mean entropy plus a share of their mean perturbation; times a power of their
    tokens if long answers are the worse ones."""
    weight = length_weight(len(trajectory.ids), length_exponent)
    return weight * (_mean(trajectory.entropies) + LATE_EPS_WEIGHT * _mean_perturbation(trajectory))


def _mean_perturbation(trajectory: Trajectory) -> float:
    return _mean([x for s in trajectory.segments for x in s.candidate.perturbations.tolist()])


def measure(
    candidate: Candidate, history: Sequence[float], reference: Moments, following: Candidate | None
) -> dict[str, float]:
    """Every signal of a candidate after segments whose mean entropies are ``history``; late ones if they exist."""
    u = e3rl_uncertainty(candidate, history, reference, _UNIT)
    paper = u.base + PAPER.gradient_weight * u.gradient + PAPER.extremum_weight * u.extremum
    cross_entropy = -_mean(candidate.logprobs)
    found = {
        "entropy": u.base,
        "entropy step": u.gradient,
        "entropy peak": u.extremum,
        "U, paper": paper,
        "ε, mean": u.perturbation,
        "ε, largest": float(candidate.perturbations.max()),
        "cross-entropy": cross_entropy,
        "surprise": cross_entropy - _mean(candidate.entropies),
        "U + ε": paper + u.perturbation,
    }
    if following is not None:
        found |= {"entropy after": _mean(following.entropies), "ε after": _mean(following.perturbations)}
    return found


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(sum(values) / len(values))
