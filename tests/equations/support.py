"""Small helpers and hypothesis strategies of the equation tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

logits = st.floats(-30, 30)
entropies = st.lists(st.floats(0, 12), min_size=1, max_size=12)
decays = st.floats(0.01, 1)
windows = st.integers(0, 14)
weights = st.floats(0, 3)


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: object, tolerance: float = 1e-9) -> None:
    """Equal values, shape and float64 type, within ``tolerance`` (absolute and relative)."""
    torch.testing.assert_close(actual, f64(expected), rtol=tolerance, atol=tolerance)


def matrix(rows: int, columns: int, values: st.SearchStrategy[float]) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(values, min_size=columns, max_size=columns), min_size=rows, max_size=rows)


@st.composite
def distributions(draw: st.DrawFn, values: st.SearchStrategy[float] = logits) -> list[float]:
    return draw(st.lists(values, min_size=1, max_size=12))


@st.composite
def segment_rows(draw: st.DrawFn, siblings: int | None = None) -> list[list[int]]:
    """Segment indices [G][T] of ragged responses, padded right with -1; every response has at least one token."""
    count = siblings or draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    size = draw(st.integers(1, 4))
    return [[t // size if t < length else -1 for t in range(max(lengths))] for length in lengths]


def num_segments(rows: Sequence[Sequence[int]]) -> int:
    return max(map(max, rows)) + 1
