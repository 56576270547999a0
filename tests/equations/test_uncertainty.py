"""Eq 6, 10-13."""

from __future__ import annotations

from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from e3rl.equations import uncertainty as u
from tests.equations import reference
from tests.equations.support import close, decays, entropies, f64, weights, windows

WEIGHTS = {"base_weight": 1.0, "gradient_weight": 0.5, "extremum_weight": 0.1, "perturbation_weight": 0.0}


def test_segment_entropy_is_the_mean() -> None:
    """Eq 10. (1 + 2 + 6) / 3 = 3."""
    close(u.segment_entropy(f64([1.0, 2.0, 6.0])), 3.0)
    close(u.segment_entropy(f64([0.4])), 0.4)


@pytest.mark.parametrize(
    ("means", "window", "expected"),
    [
        ([1.0, 2.0, 4.0], 0, 4.0),
        ([1.0, 2.0, 4.0], 1, 10 / 3),  # (4 + 2/2) / (1 + 1/2)
        ([1.0, 2.0, 4.0], 2, 3.0),  # (4 + 2/2 + 1/4) / (1 + 1/2 + 1/4) = 5.25 / 1.75
        ([1.0, 2.0, 4.0], 9, 3.0),  # a window longer than the history
        ([5.0], 3, 5.0),  # the first segment
    ],
)
def test_smooth_causal(means: list[float], window: int, expected: float) -> None:
    """Eq 11. Decay 1/2: the last segment and up to W earlier ones."""
    close(u.smooth_causal(f64(means), 0.5, window), expected)


@given(entropies, decays, windows)
def test_smoothing_agrees_with_the_reference(means: list[float], decay: float, window: int) -> None:
    """Eq 11. Against plain Python; an average, so between the extremes."""
    for n in range(len(means)):
        found = u.smooth_causal(f64(means[: n + 1]), decay, window)
        close(found, reference.smooth(means, n, decay, window, n))
        assert min(means) - 1e-9 <= found <= max(means) + 1e-9


@given(st.floats(0, 12), st.integers(1, 9), decays, windows)
def test_smoothing_a_constant_changes_nothing(level: float, count: int, decay: float, window: int) -> None:
    """Eq 11. The boundary normalisation C_n."""
    close(u.smooth_causal(f64([level] * count), decay, window), level)


def test_segment_perturbation() -> None:
    """Eq 6. Half of 0 + 0.5 over two tokens."""
    close(u.segment_perturbation(f64([[0.0, 0.5], [0.25, 0.25]])), [0.25, 0.25])


def test_largest_entropy_and_variation() -> None:
    """Eq 12. Of 1, 3, 2: the peak is 3 and the mean step (2 + 1) / 2; one token has no step."""
    close(u.largest_entropy(f64([1.0, 3.0, 2.0])), 3.0)
    close(u.entropy_variation(f64([1.0, 3.0, 2.0])), 1.5)
    close(u.largest_entropy(f64([0.7])), 0.7)
    close(u.entropy_variation(f64([0.7])), 0.0)


@given(entropies)
def test_segment_statistics_agree_with_the_reference(row: list[float]) -> None:
    """Eq 10, 12. Against plain Python; a mean step never exceeds the range."""
    close(u.segment_entropy(f64(row)), reference.mean(row))
    close(u.largest_entropy(f64(row)), max(row))
    close(u.entropy_variation(f64(row)), reference.entropy_variation(row))
    assert u.entropy_variation(f64(row)) <= max(row) - min(row) + 1e-12


def test_extremum_deviation() -> None:
    """Eq 13. (1 + 2 ln 3 - 1) / 2 = ln 3, and sigmoid(ln 3) = 3/4; at the mean 1/2; sigma 0 is held off by eps."""
    close(u.extremum_deviation(f64(1 + 2 * log(3)), 1.0, 2.0, eps=0.0), 0.75)
    close(u.extremum_deviation(f64(2.0), 2.0, 0.0), 0.5)
    close(u.extremum_deviation(f64(1e-6 * log(3)), 0.0, 0.0), 0.75)


@given(st.floats(0, 12), st.floats(0, 12), st.floats(0, 5))
def test_extremum_deviation_agrees_with_the_reference(largest: float, mean: float, std: float) -> None:
    """Eq 13. Against plain Python; within [0, 1]."""
    found = u.extremum_deviation(f64(largest), mean, std)
    close(found, reference.sigmoid((largest - mean) / (std + 1e-6)))
    assert 0 <= found <= 1


def total(*values: float, **named: float) -> Tensor:
    """U of one candidate from its four unweighted terms."""
    return f64(u.uncertainty(*[t.item() for t in u.uncertainty_terms(*map(f64, values), **named)]))


def test_uncertainty_by_hand() -> None:
    """Eq 13. 2 + 0.5 * 1.5 + 0.1 * 0.75 = 2.825; with a perturbation_weight of 0.2 another 0.2 * 0.5."""
    close(total(2.0, 1.5, 0.75, 0.5, **WEIGHTS), 2.825)
    close(total(2.0, 1.5, 0.75, 0.5, **WEIGHTS | {"perturbation_weight": 0.2}), 2.925)


def test_the_weight_of_a_length() -> None:
    """Eq 13's terms times n^x: 1 whatever the length in the paper, the root of 16 tokens, and all 16 of them."""
    assert [u.length_weight(16, x) for x in (0.0, 0.5, 1.0)] == [1.0, 4.0, 16.0]
    assert u.length_weight(1, 0.7) == 1.0


@pytest.mark.parametrize(
    ("name", "term"),
    [("base_weight", 2.0), ("gradient_weight", 1.5), ("extremum_weight", 0.75), ("perturbation_weight", 0.5)],
)
def test_uncertainty_with_one_term_only(name: str, term: float) -> None:
    """Eq 13. Every weight switches its own term (the paper's table 2)."""
    only = dict.fromkeys(WEIGHTS, 0.0) | {name: 4.0}
    close(total(2.0, 1.5, 0.75, 0.5, **only), 4 * term)


@given(st.lists(st.floats(0, 12), min_size=4, max_size=4), st.lists(weights, min_size=4, max_size=4))
def test_uncertainty_is_the_sum_of_its_terms(values: list[float], factors: list[float]) -> None:
    """Eq 13. The terms that are reported are the terms that are judged."""
    named = dict(zip(WEIGHTS, factors, strict=True))
    terms = u.uncertainty_terms(*map(f64, values), **named)
    assert [t.item() for t in terms] == [v * w for v, w in zip(values, factors, strict=True)]
    close(total(*values, **named), sum(v * w for v, w in zip(values, factors, strict=True)))


@given(st.lists(entropies, min_size=1, max_size=4), decays, windows, st.floats(0, 6), st.floats(0, 3))
def test_uncertainty_from_entropies_agrees_with_the_reference(
    segments: list[list[float]], decay: float, window: int, mean: float, std: float
) -> None:
    """Eq 10-13. From the token entropies of a trajectory to U of its last segment."""
    last = f64(segments[-1])
    means = torch.stack([u.segment_entropy(f64(s)) for s in segments])
    peak = u.extremum_deviation(u.largest_entropy(last), mean, std)
    smooth = u.smooth_causal(means, decay, window)
    found = total(float(smooth), float(u.entropy_variation(last)), float(peak), 0.0, **WEIGHTS)
    n = len(segments) - 1
    smoothed = reference.smooth([reference.mean(s) for s in segments], n, decay, window, n)
    outlier = reference.sigmoid((max(segments[-1]) - mean) / (std + 1e-6))
    close(found, smoothed + 0.5 * reference.entropy_variation(segments[-1]) + 0.1 * outlier)
