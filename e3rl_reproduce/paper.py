"""The papers' numbers, as data: model, row, benchmark, metric. Figures have no numbers in the papers."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@functools.cache
def _all() -> dict[str, Any]:
    return dict(json.loads((Path(__file__).parent / "paper.json").read_text(encoding="utf-8")))


def paper_models(table: str) -> list[str]:
    """The models that a table has, as the paper names them."""
    return list(_all().get(table, {}))


def paper_row(table: str, model: str, row: str) -> Mapping[str, Mapping[str, float | None]]:
    """Benchmark to metric to value; empty where the paper has no such row."""
    return dict(_all().get(table, {}).get(model, {}).get(row, {}))


def paper_mean(table: str, model: str, row: str, metric: str) -> float | None:
    """Mean over the benchmarks; None where the paper leaves a value out."""
    values = [value.get(metric) for value in paper_row(table, model, row).values()]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
