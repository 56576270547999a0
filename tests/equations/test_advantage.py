"""Eq 20, and the settings `degenerate_groups` and `allocation`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from e3rl.equations import advantage
from tests.equations import reference
from tests.equations.support import close, f64, matrix

rewards = st.lists(st.floats(-2, 2), min_size=1, max_size=8)


def test_segment_advantages_by_hand() -> None:
    """Eq 20. Segment 0 has rewards 3, 1: mean 2, population deviation 1 (the sample's would be 1.41)."""
    close(advantage.segment_advantages(f64([[3.0, 0.5], [1.0, 0.5]]), eps=0.5), [[1 / 1.5, 0.0], [-1 / 1.5, 0.0]])
    close(advantage.segment_advantages(f64([[3.0], [1.0]]), 1e-6), [[1 / 1.000001], [-1 / 1.000001]])


def test_a_missing_segment_counts_with_reward_zero() -> None:
    """Eq 20. Of four siblings only one has a second segment, worth 4: mean 1, deviation sqrt 3 over all four."""
    column = advantage.segment_advantages(f64([[4.0], [0.0], [0.0], [0.0]]), eps=0.0)
    close(column, [[3**0.5], [-(3**-0.5)], [-(3**-0.5)], [-(3**-0.5)]])


def test_one_sibling_has_no_advantage() -> None:
    """Eq 20. G = 1: 0, not NaN."""
    close(advantage.segment_advantages(f64([[1.0, 2.0]]), 1e-6), [[0.0, 0.0]])
    close(advantage.sequence_advantages(f64([1.0]), 1e-6), [0.0])


def test_sequence_advantages_by_hand() -> None:
    """Eq 20. Rewards 1, 0, 0, 0: mean 1/4, population deviation sqrt 3 / 4."""
    close(advantage.sequence_advantages(f64([1.0, 0.0, 0.0, 0.0]), eps=0.0), [3**0.5, *[-(3**-0.5)] * 3])
    close(advantage.sequence_advantages(f64([1.0, 0.0]), eps=0.5), [0.5, -0.5])
    close(advantage.sequence_advantages(f64([1.0, 0.0]), 1e-6), [0.5 / 0.500001, -0.5 / 0.500001])


@given(st.integers(1, 6).flatmap(lambda g: matrix(g, 3, st.floats(-2, 2))), st.floats(1e-4, 1))
def test_segment_advantages_agree_with_the_reference(rows: list[list[float]], eps: float) -> None:
    """Eq 20. Against plain Python; every segment's advantages have mean 0."""
    found = advantage.segment_advantages(f64(rows), eps)
    columns = [reference.advantages(column, eps) for column in zip(*rows, strict=True)]
    close(found.T, columns, tolerance=1e-7)
    close(found.mean(0), [0.0] * 3)


@given(rewards, st.floats(0.1, 10), st.floats(-5, 5))
def test_sequence_advantages_agree_with_the_reference(values: list[float], scale: float, shift: float) -> None:
    """Eq 20. Against plain Python; zero mean; blind to the rewards' origin, and to their scale without eps."""
    found = advantage.sequence_advantages(f64(values), 1e-3)
    close(found, reference.advantages(values, 1e-3), tolerance=1e-7)
    close(found.mean(), 0.0)
    assume(reference.deviation(values) > 0.01)
    moved = advantage.sequence_advantages(scale * f64(values) + shift, 0.0)
    close(moved, advantage.sequence_advantages(f64(values), 0.0).tolist(), tolerance=1e-7)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 1.0, 1.0], True), ([0.0], True), ([1.0, 1.0, 0.0], False), ([0.0, 1.0], False), ([0.1, 0.1 + 1e-9], False)],
)
def test_is_degenerate(values: list[float], expected: bool) -> None:
    """Eq 20. Equal is equal; a small difference is still a difference."""
    assert bool(advantage.is_degenerate(f64(values))) is expected


def test_why_degenerate_groups_are_silenced() -> None:
    """Eq 20. All siblings are right, their attention differs by 2 %: the formula makes advantages of almost 1 of it."""
    group = f64([[0.51, 0.49], [0.49, 0.51]])
    assert bool(advantage.is_degenerate(group.sum(-1)))
    close(advantage.segment_advantages(group, 1e-6), [[1.0, -1.0], [-1.0, 1.0]], tolerance=1e-3)


def test_anchored_advantages_by_hand() -> None:
    """Eq 19-20. A 2 over shares 1/4, 3/4 of two segments: 1 and 3, mean 2; a lone segment gets A itself."""
    found = advantage.anchored_advantages(f64([2.0, -1.0]), f64([[0.25, 0.75], [1.0, 0.0]]), torch.tensor([2, 1]))
    close(found, [[1.0, 3.0], [-1.0, 0.0]])


def test_anchored_keeps_the_sign_that_eq_20_loses() -> None:
    """Eq 19-20. Two right responses and a wrong one; the first's first segment has the smaller share."""
    shares, sequence_rewards = f64([[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]]), f64([1.0, 1.0, 0.0])
    causal = advantage.segment_advantages(sequence_rewards[:, None] * shares, 1e-6)
    assert causal[0, 0] < 0  # a right response is pushed away from its own segment
    anchored = advantage.anchored_advantages(
        advantage.sequence_advantages(sequence_rewards, 1e-6), shares, torch.tensor([2, 2, 2])
    )
    assert (anchored[:2] > 0).all()
    assert (anchored[2] < 0).all()


@given(
    st.lists(st.tuples(st.floats(-3, 3), st.lists(st.floats(0.01, 1), min_size=4, max_size=4)), min_size=1, max_size=5)
)
def test_anchored_advantages_keep_sign_and_mean(siblings: list[tuple[float, list[float]]]) -> None:
    """Eq 19-20. Each segment has the sequence advantage's sign, and their mean is that advantage."""
    sequence = f64([a for a, _ in siblings])
    shares = f64([[s / sum(row) for s in row] for _, row in siblings])
    found = advantage.anchored_advantages(sequence, shares, torch.full((len(siblings),), 4))
    assert (found * sequence[:, None] >= 0).all()
    close(found.mean(-1), sequence.tolist())


def test_value_advantages_by_hand() -> None:
    """Ours. Rewards 5 and 1, so 1 and 0, of mean and deviation ½: odds 0. At segment 0 U is 1 and 3 (mean 2): V = sigmoid(±1).
    The first response has two segments, the second three; U of a last segment doesn't matter to its own response."""
    up = float(torch.sigmoid(f64(1.0)))
    u_GN = f64([[1.0, 9.0, -1.0], [3.0, 7.0, 4.0]])
    exists_GN = torch.tensor([[True, True, False], [True, True, True]])
    after = float(torch.sigmoid(f64(1.0)))  # at segment 1 U is 9 and 7, mean 8: the second one's V
    expected = [[2 * (up - 0.5), 2 * (1 - up), 0.0], [3 * (0.5 - up), 3 * (after - (1 - up)), 3 * (0 - after)]]
    found = advantage.value_advantages(f64([5.0, 1.0]), u_GN, exists_GN, eps=0.5)
    close(found, expected)
    sequence = advantage.sequence_advantages(f64([1.0, 0.0]), eps=0.5)
    close(found.sum(1) / exists_GN.sum(1), sequence.tolist())


def test_a_group_without_a_right_answer_has_odds_off_zero() -> None:
    """Ours. Of three siblings one is right: (1 + ½) / (3 + 1), and U alike, so nothing changes until the last segment."""
    found = advantage.value_advantages(
        f64([1.0, 0.0, 0.0]), f64([[2.0, 2.0]] * 3), torch.ones(3, 2, dtype=torch.bool), 0.0
    )
    mean, odds, std = 1 / 3, 1.5 / 4, (2 / 9) ** 0.5
    close(found, [[2 * (odds - mean) / std, 2 * (r - odds) / std] for r in (1.0, 0.0, 0.0)])


def test_step_credit_by_hand() -> None:
    """Ours. Judged tokens have U 0.9, 0.9, 0.1 and 0.5, of mean 0.6; a token that was not judged gets none."""
    u_GT, judged_GT = f64([[0.9, 0.9, 0.1], [0.5, -1.0, -1.0]]), torch.tensor([[True] * 3, [True, False, False]])
    close(advantage.step_credit(u_GT, judged_GT), [[-0.3, -0.3, 0.5], [0.1, 0.0, 0.0]])
    assert not advantage.step_credit(u_GT, torch.zeros_like(judged_GT)).any()
