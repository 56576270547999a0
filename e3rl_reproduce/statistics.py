"""Means with 95 % intervals over seeds, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 %, by degrees of freedom from 1."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half width of its 95 % interval (NaN with one seed)."""

    mean: float
    half_width: float
    seeds: int

    def text(self, digits: int = 3, sign: bool = False) -> str:
        """For tables; one seed has no interval, which is said by leaving it out."""
        form = f"{'+' if sign else ''}.{digits}f"
        spread = "" if math.isnan(self.half_width) else f" ± {self.half_width:.{digits}f}"
        return f"{self.mean:{form}}{spread}"


def estimate(values: Sequence[float]) -> Estimate | None:
    """Student's t interval; None of nothing."""
    if not values:
        return None
    if len(values) == 1:
        return Estimate(values[0], math.nan, 1)
    freedom = len(values) - 1
    t = _T95[freedom - 1] if freedom <= len(_T95) else 1.96
    return Estimate(mean(values), t * stdev(values) / math.sqrt(len(values)), len(values))


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Mean of the differences by seed, over the seeds that both have."""
    return estimate([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])
