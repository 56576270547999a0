"""How the uncertainty U of a candidate is measured: eq 13, or a function from outside the package."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from e3rl.config import ErasureConfig
from e3rl.equations import uncertainty
from e3rl.errors import UserError
from e3rl.plugins import load
from e3rl.rollout.moments import Moments
from e3rl.rollout.value import PRIOR, ValueHead, features
from e3rl.types import TERMS, Candidate, Draw, Problem, Prompt, Uncertainty

UNCERTAINTY_METRICS = {
    "e3rl": "e3rl.rollout.metric:e3rl_uncertainty",
    "value": "e3rl.rollout.metric:value_uncertainty",
}


class UncertaintyMetric(Protocol):
    """A pure function from a candidate to its uncertainty. The larger its ``total``, the sooner it is erased."""

    def __call__(
        self, candidate: Candidate, history: Sequence[float], reference: Moments, config: ErasureConfig
    ) -> Uncertainty:
        """U of a candidate behind segments whose mean entropies are ``history``.

        ``reference``: moments of the token entropies that eq 13 compares a peak with. ``total`` is finite, not negative
        and the sum of the terms; ``smoothed`` is what eq 18 holds against the baseline, so on the scale of ``total``.
        """


@dataclass(frozen=True)
class CandidatePlace:
    """Where a candidate stands, for a metric with a parameter ``place``: what it follows, and the draw that names it."""

    prompt: Prompt
    ids: Sequence[int]
    """The tokens of the response before it."""
    draw: Draw


def single_term(total: float) -> Uncertainty:
    """The `Uncertainty` of a metric that is one number."""
    return Uncertainty(total=total, base=total, gradient=0.0, extremum=0.0, perturbation=0.0, smoothed=total)


def e3rl_uncertainty(
    candidate: Candidate, history: Sequence[float], reference: Moments, config: ErasureConfig
) -> Uncertainty:
    """Eq 13's U of a candidate that would follow the sibling's committed segments, weighed by its length."""
    return _e3rl_uncertainties([candidate], [history], reference, config)[0]


def value_uncertainty(
    candidate: Candidate, history: Sequence[float], reference: Moments, config: ErasureConfig, head: ValueHead
) -> Uncertainty:
    """U as a critic has it that learns from training's own rewards (`e3rl.rollout.value`); the terms' weights don't matter."""
    return single_term(head.suspicion(features(candidate, history)))


CandidatePlaces = Callable[[], Sequence[CandidatePlace]]
SiblingsMetric = Callable[
    [Sequence[Candidate], Sequence[Sequence[float]], Moments, ErasureConfig, CandidatePlaces], Sequence[Uncertainty]
]
"""An `UncertaintyMetric` of several siblings' candidates, each behind its own history. Places are asked for where needed."""


def siblings_metric(name: str, head: ValueHead = PRIOR) -> SiblingsMetric:
    """The metric that ``name`` stands for, of a whole barrier at once: many candidates cost hardly more than one. ``head`` is
    for metrics that learn."""
    metric: Callable[..., Uncertainty] = load_metric(name)
    if wants(metric, "head"):
        metric = functools.partial(metric, head=head)
    if metric is e3rl_uncertainty:
        return lambda candidates, histories, reference, config, places: _e3rl_uncertainties(
            candidates, histories, reference, config
        )
    if wants(metric, "place"):
        return lambda candidates, histories, reference, config, places: [
            metric(candidate, history, reference, config, place=place)
            for candidate, history, place in zip(candidates, histories, places(), strict=True)
        ]
    return lambda candidates, histories, reference, config, places: [
        metric(candidate, history, reference, config) for candidate, history in zip(candidates, histories, strict=True)
    ]


def wants(metric: Callable[..., Any], what: str) -> bool:
    """Whether the metric has this parameter: ``place``, or ``head`` if it learns."""
    return what in inspect.signature(metric).parameters


def _e3rl_uncertainties(
    candidates: Sequence[Candidate], histories: Sequence[Sequence[float]], reference: Moments, config: ErasureConfig
) -> list[Uncertainty]:
    """`e3rl_uncertainty` of each; those of one shape together."""
    shapes = [(len(c.entropies), len(h)) for c, h in zip(candidates, histories, strict=True)]
    found: dict[int, Uncertainty] = {}
    for shape in dict.fromkeys(shapes):
        here = [number for number, its_shape in enumerate(shapes) if its_shape == shape]
        alike = _of_one_shape([candidates[i] for i in here], [histories[i] for i in here], reference, config)
        found |= dict(zip(here, alike, strict=True))
    return [found[number] for number in range(len(candidates))]


def _of_one_shape(
    candidates: Sequence[Candidate], histories: Sequence[Sequence[float]], reference: Moments, config: ErasureConfig
) -> list[Uncertainty]:
    entropies_GT = _tensor([candidate.entropies for candidate in candidates])
    latest_G1 = uncertainty.segment_entropy(entropies_GT).unsqueeze(1)
    means_GN = torch.cat([_tensor(histories), latest_G1], 1)
    smoothed_G = uncertainty.smooth_causal(means_GN, config.smoothing_decay, config.smoothing_window)
    largest_G = uncertainty.largest_entropy(entropies_GT)
    terms = uncertainty.uncertainty_terms(
        smoothed_G,
        uncertainty.entropy_variation(entropies_GT),
        uncertainty.extremum_deviation(largest_G, reference.mean, reference.std),
        uncertainty.segment_perturbation(_tensor([candidate.perturbations for candidate in candidates])),
        base_weight=config.base_weight,
        gradient_weight=config.gradient_weight,
        extremum_weight=config.extremum_weight,
        perturbation_weight=config.perturbation_weight,
    )
    weight = uncertainty.length_weight(entropies_GT.shape[1], config.length_exponent)
    each = (weight * torch.stack([*terms, smoothed_G], 1)).tolist()
    total = uncertainty.uncertainty
    return [
        Uncertainty(total(base, step, peak, eps), base, step, peak, eps, smoothed)
        for base, step, peak, eps, smoothed in each
    ]


@functools.cache
def load_metric(name: str) -> UncertaintyMetric:
    """The metric that ``name`` stands for, its behaviour on a toy candidate checked."""
    metric: UncertaintyMetric = load("uncertainty metric", name, UNCERTAINTY_METRICS)
    check_metric_runs(name, metric)
    return metric


def broken(name: str, clause: str) -> UserError:
    """The error that names the metric and the clause of the contract that it breaks."""
    return UserError(f"uncertainty metric '{name}' breaks its contract: {clause}. See docs/extend.md.")


def toy_candidate(entropies: Sequence[float] = (0.2, 1.5, 0.7), perturbation: float = 0.3) -> Candidate:
    """A candidate with these entropies."""
    size = len(entropies)
    logprobs, perturbations = tuple(-h for h in entropies), (perturbation,) * size
    ones, ranks = (1.0,) * size, (1,) * size
    return Candidate(tuple(range(2, 2 + size)), logprobs, tuple(entropies), perturbations, ones, ranks, False)


def toy_place() -> CandidatePlace:
    """A place in the response to a lab problem."""
    columns = {"family": "path", "level": 1, "question": "ab;bc;a>c:", "solution": "bc"}
    prompt = Prompt(Problem("toy", "ab;bc;a>c:", "bc", columns), (2, 3, 4))
    return CandidatePlace(prompt, (5, 6), Draw(0, 0, "toy", 0, 1, 0))


def check_metric_runs(name: str, metric: UncertaintyMetric) -> None:
    """Raise UserError unless ``metric`` can be called and gives a sound `Uncertainty` for a toy candidate."""
    if not callable(metric) or isinstance(metric, type):
        raise broken(name, f"it must be a function, and is a {type(metric).__name__}")
    measure(name, metric, toy_candidate(), (0.6, 0.9), Moments.of((0.1, 0.9, 1.4)), ErasureConfig())


def measure(
    name: str,
    metric: UncertaintyMetric,
    candidate: Candidate,
    history: Sequence[float],
    reference: Moments,
    config: ErasureConfig,
) -> Uncertainty:
    """What ``metric`` says of the candidate, checked."""
    try:
        usual: dict[str, Any] = {"place": toy_place(), "head": PRIOR}
        told = {what: value for what, value in usual.items() if wants(metric, what)}
        u = metric(candidate, history, reference, config, **told)
    except Exception as error:  # a metric from outside may fail in any way
        raise broken(name, f"it failed on {len(candidate.ids)} tokens with {type(error).__name__}: {error}") from error
    if not isinstance(u, Uncertainty):
        raise broken(name, f"it must return an Uncertainty, and returned a {type(u).__name__}")
    terms = [getattr(u, term) for term in TERMS]
    numbers = (u.total, u.smoothed, *terms)
    if not all(isinstance(x, float | int) and math.isfinite(x) for x in numbers):
        raise broken(name, f"every field of its Uncertainty must be a finite number, and it returned {u}")
    if u.total < 0:
        raise broken(name, f"U is {u.total}; below 0 the attempt penalty would lower the threshold it should raise")
    if not math.isclose(u.total, math.fsum(terms), rel_tol=1e-6, abs_tol=1e-9):
        raise broken(name, f"the terms of U must add up to it: {tuple(terms)} and {u.total}")
    return u


def _tensor(rows: Sequence[Sequence[float] | np.ndarray]) -> Tensor:
    return torch.from_numpy(np.array(rows, dtype=np.float64))  # twice as fast as torch.tensor
