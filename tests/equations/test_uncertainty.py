"""Eq 10-13."""

from __future__ import annotations

from math import inf, log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e3rl.equations import uncertainty as u
from tests.equations import reference
from tests.equations.support import close, decays, distributions, entropies, f64, logits, weights, windows

WEIGHTS = {"base_weight": 1.0, "gradient_weight": 0.5, "extremum_weight": 0.1, "perturbation_weight": 0.0}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0.0] * 4, log(4)),  # uniform
        ([1000.0, 1000.0], log(2)),  # large logits do not overflow
        ([log(2), 0.0, 0.0], 1.5 * log(2)),  # p = 1/2, 1/4, 1/4: 1/2 ln 2 + 2 * 1/4 ln 4
        ([0.0, -inf, 0.0], log(2)),  # a truncated token adds nothing
        ([3.0, -inf, -inf], 0.0),  # certain
        ([7.0], 0.0),  # a vocabulary of one
    ],
)
def test_token_entropy(row: list[float], expected: float) -> None:
    """Eq 10. In nats."""
    close(u.token_entropy(f64(row)), expected)


@given(distributions(), st.floats(-50, 50))
def test_token_entropy_agrees_with_the_reference(row: list[float], shift: float) -> None:
    """Eq 10. Against plain Python; within [0, log V]; the same for shifted and for reordered logits."""
    found = u.token_entropy(f64(row))
    close(found, reference.token_entropy(row))
    assert 0 <= found <= log(len(row)) + 1e-12
    close(u.token_entropy(f64(row[::-1]) + shift), float(found))


@given(st.lists(st.lists(logits, min_size=5, max_size=5), min_size=1, max_size=4))
def test_token_entropy_of_many_rows(rows: list[list[float]]) -> None:
    """Eq 10. Leading dimensions are independent."""
    close(u.token_entropy(f64([rows])), [[reference.token_entropy(row) for row in rows]])


def test_token_entropy_gradient() -> None:
    """Eq 10. Numerically right, and finite where a token is impossible: H = ln 2 is then a maximum, its gradient 0."""
    assert torch.autograd.gradcheck(u.token_entropy, (f64([[0.3, -1.0, 2.0]]).requires_grad_(),))
    row = f64([0.0, -inf, 0.0]).requires_grad_()
    u.token_entropy(row).backward()
    assert row.grad is not None
    close(row.grad, [0.0, 0.0, 0.0])


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
    """Eq 11. D2, decay 1/2: the last segment and up to W earlier ones."""
    close(u.smooth_causal(f64(means), 0.5, window), expected)


def test_smooth_centered() -> None:
    """Eq 11. Decay 1/2, W 1: (1 + 2/2)/1.5, (2 + 1/2 + 4/2)/2, (4 + 2/2)/1.5."""
    close(u.smooth_centered(f64([1.0, 2.0, 4.0]), 0.5, 1), [4 / 3, 2.25, 10 / 3])
    close(u.smooth_centered(f64([5.0]), 0.5, 3), [5.0])


@given(entropies, decays, windows)
def test_smoothing_agrees_with_the_reference(means: list[float], decay: float, window: int) -> None:
    """Eq 11. Against plain Python; an average, so between the extremes; at the last segment both forms are one."""
    last = len(means) - 1
    centered = u.smooth_centered(f64(means), decay, window)
    close(centered, [reference.smooth(means, n, decay, window, last) for n in range(len(means))])
    for n in range(len(means)):
        close(u.smooth_causal(f64(means[: n + 1]), decay, window), reference.smooth(means, n, decay, window, n))
    assert min(means) - 1e-9 <= centered.min()
    assert centered.max() <= max(means) + 1e-9
    close(u.smooth_causal(f64(means), decay, window), float(centered[-1]))


@given(st.floats(0, 12), st.integers(1, 9), decays, windows)
def test_smoothing_a_constant_changes_nothing(level: float, count: int, decay: float, window: int) -> None:
    """Eq 11. The boundary normalisation C_n."""
    close(u.smooth_causal(f64([level] * count), decay, window), level)
    close(u.smooth_centered(f64([level] * count), decay, window), [level] * count)


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
    close(u.extremum_deviation(f64(1 + 2 * log(3)), f64(1.0), f64(2.0), eps=0.0), 0.75)
    close(u.extremum_deviation(2.0, 2.0, 0.0), 0.5)
    close(u.extremum_deviation(1e-6 * log(3), 0.0, 0.0), 0.75)


@given(st.floats(0, 12), st.floats(0, 12), st.floats(0, 5))
def test_extremum_deviation_agrees_with_the_reference(largest: float, mean: float, std: float) -> None:
    """Eq 13. Against plain Python; within [0, 1]."""
    found = u.extremum_deviation(f64(largest), mean, std)
    close(found, reference.sigmoid((largest - mean) / (std + 1e-6)))
    assert 0 <= found <= 1


def test_uncertainty_by_hand() -> None:
    """Eq 13. 2 + 0.5 * 1.5 + 0.1 * 0.75 = 2.825; with D14's 0.2 * 0.5 it is 2.925."""
    close(u.uncertainty(2.0, 1.5, 0.75, 0.5, **WEIGHTS), 2.825)
    close(u.uncertainty(f64(2.0), f64(1.5), f64(0.75), f64(0.5), **WEIGHTS | {"perturbation_weight": 0.2}), 2.925)


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
    close(u.uncertainty(2.0, 1.5, 0.75, 0.5, **only), 4 * term)


@given(st.lists(st.floats(0, 12), min_size=4, max_size=4), st.lists(weights, min_size=4, max_size=4))
def test_uncertainty_is_the_sum_of_its_terms(values: list[float], factors: list[float]) -> None:
    """Eq 13. The terms that are reported are the terms that are judged."""
    named = dict(zip(WEIGHTS, factors, strict=True))
    terms = u.uncertainty_terms(*values, **named)
    assert [t.item() for t in terms] == [v * w for v, w in zip(values, factors, strict=True)]
    close(u.uncertainty(*values, **named), sum(v * w for v, w in zip(values, factors, strict=True)))


@given(st.lists(entropies, min_size=1, max_size=4), decays, windows, st.floats(0, 6), st.floats(0, 3))
def test_uncertainty_from_entropies_agrees_with_the_reference(
    segments: list[list[float]], decay: float, window: int, mean: float, std: float
) -> None:
    """Eq 10-13. From the token entropies of a trajectory to U of its last segment."""
    last = f64(segments[-1])
    means = torch.stack([u.segment_entropy(f64(s)) for s in segments])
    peak = u.extremum_deviation(u.largest_entropy(last), mean, std)
    found = u.uncertainty(u.smooth_causal(means, decay, window), u.entropy_variation(last), peak, 0.0, **WEIGHTS)
    n = len(segments) - 1
    smoothed = reference.smooth([reference.mean(s) for s in segments], n, decay, window, n)
    outlier = reference.sigmoid((max(segments[-1]) - mean) / (std + 1e-6))
    close(found, smoothed + 0.5 * reference.entropy_variation(segments[-1]) + 0.1 * outlier)
