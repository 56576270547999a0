"""What `e3rl reproduce when` compares: families of problems, baselines, and every way to train with erasure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from e3rl.diagnose.decoding import HALF_EPS, LATE_EPS, LATE_EPS_LENGTH
from e3rl_reproduce.study import Scale

FAMILIES = {"lab": ("lab:path:2", "lab:ways:2"), "smoke": ("lab:path:1",)}
"""What is trained on, by scale. At other scales it is the recipe's own data."""


@dataclass(frozen=True)
class Method:
    """A row's overlay of the recipe and its overrides. ``segments``: of a response; 0: the recipe's."""

    overlay: str
    overrides: tuple[str, ...] = ()
    segments: int = 0


_EPS = (
    "erasure.base_weight=0.0",
    "erasure.gradient_weight=0.0",
    "erasure.extremum_weight=0.0",
    "erasure.perturbation_weight=1.0",
    "erasure.kappa0=0.5",
)
_LATE = (
    "erasure.gradient_weight=0.0",
    "erasure.extremum_weight=0.0",
    "erasure.smoothing_window=0",
    "erasure.rho=0.0",
    "erasure.kappa0=-0.5",
)
_LATE_EPS = (*_LATE, "erasure.perturbation_weight=0.3", "erasure.baseline=quantile", "erasure.quantile=0.2")
_CONTRAST = "objective.erased=contrast"
_ALLOCATIONS = ("causal", "sequence", "anchored")


def _erasing(
    name: str, overrides: tuple[str, ...], allocations: Sequence[str] = _ALLOCATIONS, *, segments: int = 0
) -> dict[str, Method]:
    """A way to erase under every allocation, with erased candidates dropped and as contrast."""
    found = {}
    for allocation in allocations:
        title = name if allocation == "causal" else f"{name}, {allocation}"
        allocated = (*overrides, f"objective.allocation={allocation}")
        found[title] = Method("e3rl", allocated, segments)
        found[f"{title}+contrast"] = Method("e3rl", (*allocated, _CONTRAST), segments)
    return found


METHODS: Mapping[str, Method] = {
    "Vanilla": Method("vanilla"),
    "GRPO": Method("grpo"),
    "GRPO, rollouts at T = 0.6": Method("grpo", ("rollout.temperature=0.6",)),
    "DAPO": Method("dapo"),
    "GSPO": Method("gspo"),
    "SAPO": Method("sapo"),
    "ERPO": Method("erpo"),
    **_erasing("E³RL", ()),
    **_erasing("E³RL+ε", _EPS),
    **_erasing("E³RL late", _LATE, ("causal",), segments=1),
    **_erasing("E³RL late+ε", _LATE_EPS, ("causal",), segments=1),
    **_erasing("E³RL halves+ε", _LATE_EPS, ("causal",), segments=2),
}
"""Every way to train that is compared. 'late': a response is one segment, judged by its whole entropy
(`e3rl.diagnose`), so allocations don't differ. 'halves': two segments."""

_FEWER = {
    "smoke": ("Vanilla", "GRPO", "E³RL+ε+contrast", "E³RL late+ε+contrast"),
    "smollm2": ("Vanilla", "GRPO", "GRPO, rollouts at T = 0.6", "E³RL", "E³RL+ε+contrast", "E³RL late+ε+contrast"),
}
"""Scales with fewer methods: a training of the real model takes minutes where the embedded one takes seconds."""

_PLAIN = ((1.0, ""), (0.6, ""), (0.3, ""))
_WAYS = (*_PLAIN, (1.0, LATE_EPS), (0.6, LATE_EPS), (1.0, HALF_EPS), (0.6, HALF_EPS))
_OTHER_WAYS = {
    "smollm2": (*_PLAIN, (0.6, LATE_EPS), (0.6, LATE_EPS_LENGTH)),
}
"""Other ways at some scales, where each costs minutes of the real model."""

BASELINES = ("Vanilla", "GRPO", "GRPO, rollouts at T = 0.6", "DAPO", "GSPO", "SAPO", "ERPO")


def families(scale: Scale) -> tuple[str, ...]:
    return FAMILIES.get(scale.name, ("",))


def methods(scale: Scale) -> tuple[str, ...]:
    """The methods that every family is trained with at a scale."""
    return _FEWER.get(scale.name, tuple(METHODS))


def ways(scale: Scale) -> tuple[tuple[float, str], ...]:
    """Temperature and erasure setting (none: plain) of the ways that every model is decoded in; the first is plain at 1."""
    return _OTHER_WAYS.get(scale.name, _WAYS)


def label(family: str, method: str) -> str:
    return f"{family}: {method}" if family else method
