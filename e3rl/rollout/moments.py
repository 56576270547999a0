"""Summaries of many numbers that can be merged and saved: moments, and markers of equal shares (quantiles)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

MARKERS = 64
"""Most markers that are kept; up to so many numbers are kept as they are."""


@dataclass(frozen=True, slots=True)
class Moments:
    """``m2`` is the sum of squared deviations from the mean, so merging loses nothing."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    @property
    def std(self) -> float:
        """Population standard deviation; 0 of nothing."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    @staticmethod
    def of(values: Sequence[float] | np.ndarray) -> Moments:
        """The moments of ``values``, in whatever order they come."""
        if not len(values):
            return Moments()
        values = values.tolist() if isinstance(values, np.ndarray) else values
        mean = math.fsum(values) / len(values)
        return Moments(len(values), mean, math.fsum((v - mean) ** 2 for v in values))

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of numbers together."""
        count = self.count + other.count
        if not count:
            return self
        distance = other.mean - self.mean
        mean = self.mean + distance * other.count / count
        return Moments(count, mean, self.m2 + other.m2 + distance**2 * self.count * other.count / count)

    def to_table(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @staticmethod
    def from_table(table: Mapping[str, Any]) -> Moments:
        """What `to_table` gave; KeyError, TypeError or ValueError where the table can't have come from it."""
        moments = Moments(int(table["count"]), float(table["mean"]), float(table["m2"]))
        if moments.count < 0 or not math.isfinite(moments.mean) or not 0 <= moments.m2 < math.inf:
            raise ValueError(f"impossible moments {dict(table)}")
        return moments


@dataclass(frozen=True, slots=True)
class Distribution:
    """``markers``, in order, stand for equal shares of the numbers. Statistics of earlier versions have none."""

    moments: Moments = field(default_factory=Moments)
    markers: tuple[float, ...] = ()

    @staticmethod
    def of(values: Sequence[float]) -> Distribution:
        """What is kept of ``values``, in whatever order they come."""
        return Distribution(Moments.of(values), _divided([(v, 1.0) for v in values]))

    def merged(self, other: Distribution) -> Distribution:
        """Both sets of numbers together: moments exactly, markers exactly while all numbers are kept."""
        both = (self, other)
        weighted = [(v, d.moments.count / len(d.markers)) for d in both for v in d.markers]
        return Distribution(self.moments.merged(other.moments), _divided(weighted))

    def to_table(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**self.moments.to_table(), "markers": list(self.markers)}

    @staticmethod
    def from_table(table: Mapping[str, Any]) -> Distribution:
        """What `to_table` gave; KeyError, TypeError or ValueError where the table can't have come from it."""
        moments = Moments.from_table(table)
        markers = tuple(float(value) for value in table.get("markers", ()))
        if list(markers) != sorted(markers) or not all(map(math.isfinite, markers)):
            raise ValueError(f"impossible markers {markers}")
        return Distribution(moments, markers)


def _divided(weighted: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    """The values in order; of more than `MARKERS` those in the middle of as many equal shares of the weight."""
    ordered = sorted(weighted)
    total = math.fsum(weight for _, weight in ordered)
    if len(ordered) <= MARKERS and len({weight for _, weight in ordered}) <= 1:
        return tuple(value for value, _ in ordered)
    kept: list[float] = []
    below = 0.0
    for value, weight in ordered:
        below += weight
        while len(kept) < MARKERS and below >= (len(kept) + 0.5) / MARKERS * total:
            kept.append(value)
    return tuple(kept)
