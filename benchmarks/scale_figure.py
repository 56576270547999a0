"""A figure of `benchmarks/scale.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A measurement, what it must reach at most, and what it is made of."""

    value: float
    limit: float
    parts: Mapping[str, float]
