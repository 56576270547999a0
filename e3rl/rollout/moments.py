"""Count, mean and spread of many numbers in three, which can be merged and saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


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
