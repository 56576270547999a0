"""Eq 23-26: every row of the state machine."""

from __future__ import annotations

from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.equations import erasure
from e3rl.equations.threshold import attempt_penalty, threshold
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
    ("verdict", "expected"),
    [
        (Verdict.COMMIT, ((1, 2, 7, 8), 0)),
        (Verdict.ERASE, ((1, 2), 4)),
        (Verdict.FORCED, ((1, 2, 7, 8), 0)),
    ],
)
def test_next_state(verdict: Verdict, expected: tuple[tuple[int, ...], int]) -> None:
    """Eq 25. Prefix (1, 2), candidate (7, 8), attempt 3."""
    assert erasure.next_state((1, 2), (7, 8), 3, verdict) == expected


def test_next_state_of_the_first_segment() -> None:
    """Eq 25. An empty prefix stays empty when the candidate is erased."""
    assert erasure.next_state((), (7,), 0, Verdict.ERASE) == ((), 1)
    assert erasure.next_state((), (7,), 0, Verdict.COMMIT) == ((7,), 0)


@given(st.lists(st.floats(0, 4), min_size=1, max_size=60), st.integers(0, 5))
def test_every_walk_keeps_the_budget(draws: list[float], max_erasures: int) -> None:
    """Eq 23-26. The prefix only grows, each step changes one thing, and a chain of erasures ends in a commit."""
    prefix: tuple[int, ...] = ()
    attempt = 0
    for token, uncertainty in enumerate(draws):
        verdict = erasure.judge(uncertainty, 2.0, attempt, max_erasures)
        after = erasure.next_state(prefix, (token,), attempt, verdict)
        committed, erased = ((*prefix, token), 0), (prefix, attempt + 1)
        assert after == (committed if uncertainty <= 2.0 or attempt == max_erasures else erased)
        prefix, attempt = after
        assert attempt <= max_erasures


def test_retry_threshold_by_hand() -> None:
    """Eq 26. 2 * exp(0.5 * sqrt(4)) * 0.9."""
    assert erasure.retry_threshold(2.0, 4, 0.9, eta=0.5, delta=0.5) == pytest.approx(1.8 * 2.718281828459045)
    assert erasure.retry_threshold(2.0, 0, 0.9, eta=0.5, delta=0.5) == pytest.approx(1.8)


@given(st.floats(0.01, 10), st.integers(0, 5), st.floats(0.5, 1.5), st.floats(0, 0.3), st.floats(0.1, 2))
def test_retry_threshold_is_that_of_eq_17(baseline: float, attempt: int, phi: float, eta: float, delta: float) -> None:
    """Eq 17, 26. The paper writes Gamma(e) twice; it is one thing."""
    expected = threshold(baseline, attempt_penalty(attempt, eta, delta), phi)
    assert erasure.retry_threshold(baseline, attempt, phi, eta=eta, delta=delta) == pytest.approx(expected.item())


def test_least_uncertain() -> None:
    """Eq 25. D8: the smallest U; the earliest of equals; one attempt is its own choice."""
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
    """Eq 25. D8: no attempt is less uncertain, and no earlier one equally so."""
    chosen = erasure.least_uncertain(uncertainties)
    assert uncertainties.index(sorted(uncertainties)[0]) == chosen
