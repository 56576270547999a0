"""Eq 8, 23-25: every row of the state machine."""

from __future__ import annotations

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.equations import erasure
from e3rl.types import Verdict


def test_trigger() -> None:
    """Eq 24. Strictly above the threshold; equality is accepted."""
    assert erasure.exceeds(2.0001, 2.0)
    assert not erasure.exceeds(2.0, 2.0)
    assert not erasure.exceeds(1.9999, 2.0)
    assert erasure.exceeds(inf, 2.0)


@pytest.mark.parametrize(("uncertainty", "threshold"), [(nan, 1.0), (1.0, nan), (nan, nan)])
def test_nan_is_never_committed(uncertainty: float, threshold: float) -> None:
    """Eq 24. What can't be compared is an error, for every attempt."""
    with pytest.raises(ValueError, match="can't be judged"):
        erasure.exceeds(uncertainty, threshold)
    for attempt in (0, 5):
        with pytest.raises(ValueError, match="can't be judged"):
            erasure.judge(uncertainty, threshold, attempt, 5)


@pytest.mark.parametrize(
    ("uncertainty", "attempt", "max_erasures", "verdict"),
    [
        (1.0, 0, 5, Verdict.COMMIT),
        (1.0, 5, 5, Verdict.COMMIT),  # below the threshold a spent budget does not matter
        (3.0, 0, 5, Verdict.ERASE),
        (3.0, 4, 5, Verdict.ERASE),
        (3.0, 5, 5, Verdict.FORCED),
        (3.0, 0, 0, Verdict.FORCED),  # a budget of none never erases
        (2.0, 0, 5, Verdict.COMMIT),  # equality
    ],
)
def test_judge(uncertainty: float, attempt: int, max_erasures: int, verdict: Verdict) -> None:
    """Eq 23-25. Against a threshold of 2."""
    assert erasure.judge(uncertainty, 2.0, attempt, max_erasures) is verdict


@pytest.mark.parametrize(
    ("verdict", "expected"), [(Verdict.COMMIT, (10, 0)), (Verdict.ERASE, (8, 4)), (Verdict.FORCED, (10, 0))]
)
def test_next_state(verdict: Verdict, expected: tuple[int, int]) -> None:
    """Eq 25. Eight committed tokens, a candidate of two, attempt 3."""
    assert erasure.next_state(8, 2, 3, verdict) == expected


def test_next_state_of_the_first_segment() -> None:
    """Eq 25. An empty prefix stays empty when the candidate is erased."""
    assert erasure.next_state(0, 1, 0, Verdict.ERASE) == (0, 1)
    assert erasure.next_state(0, 1, 0, Verdict.COMMIT) == (1, 0)


@given(st.lists(st.floats(0, 4), min_size=1, max_size=60), st.integers(0, 5))
def test_every_walk_keeps_the_budget(draws: list[float], max_erasures: int) -> None:
    """Eq 23-25. The prefix only grows, each step changes one thing, and a chain of erasures ends in a commit."""
    committed = attempt = 0
    for uncertainty in draws:
        verdict = erasure.judge(uncertainty, 2.0, attempt, max_erasures)
        after = erasure.next_state(committed, 3, attempt, verdict)
        goes_on = uncertainty <= 2.0 or attempt == max_erasures
        assert after == ((committed + 3, 0) if goes_on else (committed, attempt + 1))
        committed, attempt = after
        assert attempt <= max_erasures


@given(st.integers(1, 60), st.integers(1, 20))
def test_segments_tile_the_response(limit: int, size: int) -> None:
    """Eq 8. Gapless up to the limit, and all but the last exactly L long."""
    sizes: list[int] = []
    while sum(sizes) < limit:
        sizes.append(erasure.segment_size(sum(sizes), size, limit))
    assert sum(sizes) == limit
    assert set(sizes[:-1]) <= {size}
    assert 0 < sizes[-1] <= size


def test_least_uncertain() -> None:
    """Eq 25. The smallest U; the earliest of equals; one attempt is its own choice."""
    assert erasure.least_uncertain([3.0, 1.0, 2.0, 1.0]) == 1
    assert erasure.least_uncertain([4.0]) == 0
    assert erasure.least_uncertain([inf, 2.0]) == 1


@pytest.mark.parametrize("uncertainties", [[nan, 1.0], [1.0, nan]])
def test_least_uncertain_refuses_nan(uncertainties: list[float]) -> None:
    """Eq 25. min() would return NaN or hide it, depending on the order."""
    with pytest.raises(ValueError, match="can't be compared"):
        erasure.least_uncertain(uncertainties)


@given(st.lists(st.floats(0, 9), min_size=1, max_size=8))
def test_least_uncertain_is_a_minimum(uncertainties: list[float]) -> None:
    """Eq 25. No attempt is less uncertain, and no earlier one equally so."""
    chosen = erasure.least_uncertain(uncertainties)
    assert uncertainties.index(sorted(uncertainties)[0]) == chosen
