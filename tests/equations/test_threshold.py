"""Eq 14-18."""

from __future__ import annotations

import itertools
from math import exp, log, tanh

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.equations import threshold as th
from tests.equations import reference
from tests.equations.support import close, f64

uncertainties = st.lists(st.floats(0, 12), min_size=1, max_size=10)
histories = st.lists(st.tuples(st.floats(0, 12), st.floats(0.01, 12)), min_size=1, max_size=8)


def test_group_moments() -> None:
    """Eq 14-15. Of 1, 3, 5, 7: mean 4, population variance (9 + 1 + 1 + 9) / 4 = 5 (the sample's would be 20/3)."""
    mean, std = th.group_moments(f64([1.0, 3.0, 5.0, 7.0]))
    close(mean, 4.0)
    close(std, 5**0.5)


def test_group_moments_of_one_sibling() -> None:
    """Eq 14-15. No spread, not NaN."""
    mean, std = th.group_moments(f64([2.5]))
    close(mean, 2.5)
    close(std, 0.0)


@given(uncertainties, st.randoms(use_true_random=False))
def test_group_moments_agree_with_the_reference(values: list[float], random: object) -> None:
    """Eq 14-15. Against plain Python; the order of the siblings does not matter."""
    mean, std = th.group_moments(f64(values))
    close(mean, reference.mean(values))
    close(std, reference.deviation(values), tolerance=1e-7)
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = th.group_moments(f64(shuffled))
    close(again[0], float(mean))
    close(again[1], float(std), tolerance=1e-7)


def test_quantile_baseline() -> None:
    """Of 1, 2, 3 and 90 half lie below 2.5, however large the largest is; shares 0 and 1 are the extremes."""
    values = f64([90.0, 1.0, 3.0, 2.0])
    close(th.quantile_baseline(values, 0.5), 2.5)
    close(th.quantile_baseline(values, 0.1), 1.3)
    close(th.quantile_baseline(values, 0.0), 1.0)
    close(th.quantile_baseline(values, 1.0), 90.0)


def test_offset() -> None:
    """Eq 16. At sigma_0 it is kappa_0; tanh(ln 2) = (2 - 1/2) / (2 + 1/2) = 0.6, so 1 + 0.5 * 0.6 = 1.3."""
    close(th.offset(f64(0.1), 1.0, 0.5, 0.1), 1.0)
    close(th.offset(f64(0.2 + 0.2 * log(2)), 1.0, 0.5, 0.2, eps=0.0), 1.3)
    close(th.offset(f64(0.0), 1.0, 0.5, 0.2, eps=0.0), 1 - 0.5 * tanh(1))
    close(th.offset(f64(1e-6 * log(2)), 1.0, 0.5, 0.0), 1.3)  # sigma_0 = 0 is held off by eps


@given(st.floats(0, 10), st.floats(-2, 2), st.floats(-2, 2), st.floats(0.01, 5))
def test_offset_agrees_with_the_reference(std: float, kappa0: float, kappa1: float, sigma0: float) -> None:
    """Eq 16. Against plain Python; within kappa_0 -+ kappa_1."""
    found = th.offset(f64(std), kappa0, kappa1, sigma0)
    close(found, reference.offset(std, kappa0, kappa1, sigma0))
    assert abs(found - kappa0) <= abs(kappa1) + 1e-12


def test_macro_baseline() -> None:
    """Eq 16. 2 + 1.5 * 0.4 = 2.6; without spread the mean itself."""
    close(th.macro_baseline(f64(2.0), f64(0.4), f64(1.5)), 2.6)
    close(th.macro_baseline(f64(2.0), f64(0.0), f64(1.5)), 2.0)


@pytest.mark.parametrize(
    ("baseline", "mean", "expected"),
    [(0.5, 1.0, 0.5), (1e-9, 1.0, 1e-9), (0.0, 1.0, 1e-6), (-0.25, 0.25, 1e-6), (0.0, 0.0, 0.0)],
)
def test_floored(baseline: float, mean: float, expected: float) -> None:
    """Eq 16. Not above 0 though U is: held just above it. A group without any uncertainty has B = 0 by right."""
    assert th.floored(baseline, mean) == expected


@pytest.mark.parametrize(
    ("attempt", "eta", "delta", "expected"),
    [
        (0, 0.3, 1.5, 1.0),
        (1, 0.3, 9.0, exp(0.3)),
        (4, 0.5, 0.5, exp(1.0)),  # 0.5 * sqrt(4)
        (3, log(2), 2.0, 512.0),  # 2 ^ (3 ^ 2)
        (5, 0.0, 1.5, 1.0),  # switched off: the paper's 'w/o frequency penalty'
    ],
)
def test_attempt_penalty(attempt: int, eta: float, delta: float, expected: float) -> None:
    """Eq 17."""
    close(th.attempt_penalty(attempt, eta, delta), expected)


@given(st.floats(0.001, 0.5), st.floats(0.1, 2))
def test_attempt_penalty_rises(eta: float, delta: float) -> None:
    """Eq 17. Gamma(0) = 1, then strictly rising: each retry is judged more leniently."""
    penalties = [float(th.attempt_penalty(e, eta, delta)) for e in range(6)]
    assert penalties[0] == 1.0
    assert all(a < b for a, b in itertools.pairwise(penalties))


def test_modulation() -> None:
    """Eq 18. (4 - 2)/2 = 1 and (1 - 4)/4 = -3/4: mean 1/8, phi = 1 + 0.2 tanh(1/8). On the baseline phi is 1."""
    close(th.modulation(f64([4.0, 1.0]), f64([2.0, 4.0]), 0.2, eps=0.0), 1 + 0.2 * tanh(0.125))
    close(th.modulation(f64([3.0]), f64([3.0]), 0.2), 1.0)
    close(th.modulation(f64([1e-6 * log(2)]), f64([0.0]), 0.5), 1.3)  # tanh(ln 2) = 0.6; B = 0 is held off by eps


def test_modulation_needs_a_history() -> None:
    """Eq 18. n > 1 only: no silent NaN threshold for the first segment."""
    with pytest.raises(ValueError, match="n > 1"):
        th.modulation(f64([]), f64([]), 0.2)


@given(histories, st.floats(0, 0.99))
def test_modulation_agrees_with_the_reference(history: list[tuple[float, float]], rho: float) -> None:
    """Eq 18. Against plain Python; within [1 - rho, 1 + rho]."""
    smoothed, baselines = [h for h, _ in history], [b for _, b in history]
    found = th.modulation(f64(smoothed), f64(baselines), rho)
    close(found, reference.modulation(smoothed, baselines, rho))
    assert 1 - rho - 1e-12 <= found <= 1 + rho + 1e-12


def test_threshold_is_the_product() -> None:
    """Eq 17, 26. 2 * 1.5 * 0.9 = 2.7; siblings differ by phi alone."""
    close(th.threshold(2.0, 1.5, f64([0.9, 1.0])), [2.7, 3.0])


def test_a_retry_is_judged_against_the_same_baseline_and_history() -> None:
    """Eq 26. 2 * exp(0.5 * sqrt(4)) * 0.9: of eq 17's factors only Gamma changes with the attempt."""
    retry = th.threshold(2.0, float(th.attempt_penalty(4, 0.5, 0.5)), f64([0.9]))
    close(retry, [1.8 * exp(1)])
    close(retry / th.threshold(2.0, float(th.attempt_penalty(0, 0.5, 0.5)), f64([0.9])), [exp(1)])


@given(
    uncertainties,
    st.integers(0, 5),
    histories,
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.floats(0.01, 2),
    st.floats(0, 0.2),
)
def test_threshold_agrees_with_the_reference(
    values: list[float],
    attempt: int,
    history: list[tuple[float, float]],
    kappa0: float,
    kappa1: float,
    sigma0: float,
    eta: float,
) -> None:
    """Eq 14-18. From the siblings' uncertainties and a history to Theta_n(e)."""
    smoothed, baselines = [h for h, _ in history], [b for _, b in history]
    mean, std = th.group_moments(f64(values))
    baseline = th.macro_baseline(mean, std, th.offset(std, kappa0, kappa1, sigma0))
    phi = th.modulation(f64(smoothed), f64(baselines), 0.1)
    found = th.threshold(float(baseline), float(th.attempt_penalty(attempt, eta, 1.5)), phi)
    phi_expected = reference.modulation(smoothed, baselines, 0.1)
    close(found, reference.threshold(values, attempt, phi_expected, (kappa0, kappa1, sigma0), eta, 1.5), tolerance=1e-6)


@pytest.mark.parametrize(
    ("values", "cost", "z"),
    [
        ([0.2, 0.6], 0.1, 0.4),  # the better one alone is above it: 0.2 / 2
        ([0.2, 0.6], 0.3, 0.1),  # both: (0.1 + 0.5) / 2
        ([0.2, 0.6], 0.5, -0.1),  # a draw costs more than all of it
        ([0.5, 0.5, 0.5], 0.1, 0.4),
        ([0.9, 0.1, 0.5], 0.0, 0.9),  # for nothing: until it is the best
    ],
)
def test_reservation_value(values: list[float], cost: float, z: float) -> None:
    """Weitzman. The mean of what draws are worth above z is what a draw costs."""
    assert th.reservation_value(f64(values), cost) == pytest.approx(z)
    assert sum(max(v - z, 0) for v in values) / len(values) == pytest.approx(cost)


@given(uncertainties, st.floats(0.001, 1))
def test_what_a_reservation_baseline_erases_is_worth_less_than_z(totals: list[float], cost: float) -> None:
    """Reservation. U above the baseline is a value below z; where z is not above 0, the baseline is the largest U."""
    baseline = th.reservation_baseline(f64(totals), 3.0, cost)
    values = [1 / (1 + exp(u - 3.0)) for u in totals]
    z = th.reservation_value(f64(values), cost)
    if z <= 0:
        assert baseline == pytest.approx(max(totals))
    else:
        assert 1 / (1 + exp(baseline - 3.0)) == pytest.approx(z)
        assert all(u > baseline for u, v in zip(totals, values, strict=True) if v < z - 1e-9)
