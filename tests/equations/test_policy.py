"""Eq 1, 9, 21-22."""

from __future__ import annotations

from math import exp, inf, log, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from e3rl.equations import policy
from tests.equations import reference
from tests.equations.support import close, f64, matrix, num_segments, segment_rows

logprobs = st.floats(-6, 0)


def test_sequence_logprobs_are_logs_of_products() -> None:
    """Eq 1; ERPO eq 1. 0.5 * 0.25 * 0.8 = 0.1, and 0.3 with padding that is not even a number."""
    rows = torch.stack([f64([0.5, 0.25, 0.8]).log(), f64([log(0.3), nan, inf])])
    mask = torch.tensor([[True] * 3, [True, False, False]])
    close(policy.sequence_logprobs(rows, mask), [log(0.1), log(0.3)])


def test_sequence_mean_log_ratios() -> None:
    """ERPO eq 1. The ratio's length-th root: of 1.2 * 0.3 over two tokens; a sequence without tokens has ratio 1."""
    rows = f64([[1.2, 0.3, 7.0], [2.0, 2.0, 2.0]]).log()
    mask = torch.tensor([[True, True, False], [False] * 3])
    close(policy.sequence_mean_log_ratios(rows, mask), [log(0.36) / 2, 0.0])


@given(st.lists(logprobs, min_size=1, max_size=20), st.integers(1, 8))
def test_segments_factorise_the_sequence(row: list[float], size: int) -> None:
    """Eq 9. The segments' probabilities multiply to the sequence's, whichever way they are summed."""
    segments = [t // size for t in range(len(row))]
    count = segments[-1] + 1
    each = policy.segment_sums(f64(row), torch.tensor(segments), count)
    close(each, [sum(reference.by_segment(row, segments, n)) for n in range(count)])
    close(each.sum(), float(policy.sequence_logprobs(f64(row), torch.ones(len(row), dtype=torch.bool))))


def test_segment_sums_ignore_padding_and_keep_gradients() -> None:
    """Eq 9. Segments 0, 0, 1 and padding that is not even a number; a segment nobody is in sums to 0."""
    values = f64([[1.0, 2.0, 4.0, nan], [8.0, inf, nan, 16.0]]).requires_grad_()
    sums = policy.segment_sums(values, torch.tensor([[0, 0, 1, -1], [2, -1, -1, 2]]), 3)
    close(sums.detach(), [[3.0, 4.0, 0.0], [0.0, 0.0, 24.0]])
    (sums * f64([[1.0, 10.0, 100.0]])).sum().backward()
    assert values.grad is not None
    close(values.grad, [[1.0, 1.0, 10.0, 0.0], [100.0, 0.0, 0.0, 100.0]])


def test_segment_log_ratios() -> None:
    """Eq 22. Segment 0: (0.6 * 0.5) / (0.5 * 0.5) = 1.2 and its root; segment 1: 0.25 / 0.5; no segment 2."""
    new, old = f64([[0.6, 0.5, 0.25, 0.9]]).log(), f64([[0.5, 0.5, 0.5, 0.1]]).log()
    segments = torch.tensor([[0, 0, 1, -1]])
    close(policy.segment_log_ratios(new, old, segments, 3), [[log(1.2), log(0.5), 0.0]])
    close(policy.segment_mean_log_ratios(new, old, segments, 3), [[log(1.2) / 2, log(0.5), 0.0]])


@given(st.data(), segment_rows())
def test_segment_ratios_agree_with_the_reference(data: st.DataObject, rows: list[list[int]]) -> None:
    """Eq 22. The ratio of the products of probabilities, and its |s_n|-th root."""
    count = num_segments(rows)
    new, old = (data.draw(matrix(len(rows), len(rows[0]), logprobs)) for _ in range(2))
    found = policy.segment_log_ratios(f64(new), f64(old), torch.tensor(rows), count)
    roots = policy.segment_mean_log_ratios(f64(new), f64(old), torch.tensor(rows), count)
    for i, row in enumerate(rows):
        for n in range(count):
            new_n, old_n = reference.by_segment(new[i], row, n), reference.by_segment(old[i], row, n)
            ratio = exp(sum(new_n)) / exp(sum(old_n))
            assert found[i, n].exp().item() == pytest.approx(ratio)
            assert roots[i, n].exp().item() == pytest.approx(ratio ** (1 / max(len(new_n), 1)))


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.5, 1.0, 1.28),  # a good segment is not pushed beyond 1 + clip_high
        (1.5, -1.0, -1.5),  # a bad one that got likelier is pushed back in full
        (0.5, 1.0, 0.5),  # a good one that got unlikelier is pulled back in full
        (0.5, -1.0, -0.8),  # a bad one is not pushed below 1 - clip_low
        (1.1, 2.0, 2.2),  # inside the range nothing is clipped
        (0.9, -2.0, -1.8),
        (7.0, 0.0, 0.0),
    ],
)
def test_clipped_surrogate(ratio: float, advantage: float, expected: float) -> None:
    """Eq 21. clip_low 0.2, clip_high 0.28."""
    close(policy.clipped_surrogate(f64(ratio), f64(advantage), 0.2, 0.28), expected)


@given(st.floats(0, 10), st.floats(-5, 5), st.floats(0, 0.9), st.floats(0, 2))
def test_clipped_surrogate_agrees_with_the_reference(ratio: float, advantage: float, low: float, high: float) -> None:
    """Eq 21. Against plain Python; a pessimistic bound: never above the unclipped surrogate."""
    found = policy.clipped_surrogate(f64(ratio), f64(advantage), low, high)
    close(found, reference.surrogate(ratio, advantage, low, high))
    assert found <= ratio * advantage


def test_clipped_surrogate_gradient_stops_at_the_clip() -> None:
    """Eq 21. d/d rho is A where the minimum is unclipped and 0 where it is clipped."""
    ratio = f64([1.5, 1.5, 0.5, 0.5, 1.0]).requires_grad_()
    policy.clipped_surrogate(ratio, f64([3.0, -3.0, 3.0, -3.0, 3.0]), 0.2, 0.28).sum().backward()
    assert ratio.grad is not None
    close(ratio.grad, [0.0, -3.0, 3.0, 0.0, 3.0])


def test_k3_kl() -> None:
    """Eq 21. Reference twice as likely: 2 - ln 2 - 1; half as likely: 1/2 + ln 2 - 1; equal: 0."""
    found = policy.k3_kl(f64([0.2, 0.4, 0.3]).log(), f64([0.4, 0.2, 0.3]).log())
    close(found, [1 - log(2), log(2) - 0.5, 0.0])


@given(logprobs, logprobs)
def test_k3_kl_agrees_with_the_reference(logprob: float, other: float) -> None:
    """Eq 21. Against plain Python; never negative beyond rounding."""
    found = policy.k3_kl(f64(logprob), f64(other))
    close(found, reference.k3(logprob, other))
    assert found >= -1e-15


@given(matrix(2, 6, st.floats(-5, 5)))
def test_k3_kl_is_unbiased(rows: list[list[float]]) -> None:
    """Eq 21. Its expectation under pi is D_KL(pi || pi_ref)."""
    logp, logq = torch.log_softmax(f64(rows), -1)
    divergence = (logp.exp() * (logp - logq)).sum()
    close((logp.exp() * policy.k3_kl(logp, logq)).sum(), float(divergence))


def test_ratios_are_held_at_e_to_the_20() -> None:
    """Eq 22. exp up to 20 and a constant, without gradient, beyond."""
    log_ratios = f64([log(1.5), 20.0, 800.0]).requires_grad_()
    policy.ratios(log_ratios).sum().backward()
    close(policy.ratios(log_ratios.detach()), [1.5, exp(20), exp(20)])
    assert log_ratios.grad is not None
    close(log_ratios.grad, [1.5, exp(20), 0.0])


@given(st.floats(0, 10), st.floats(-5, 5), st.floats(0, 0.9), st.floats(0, 2))
def test_clipped_is_where_the_surrogate_has_no_gradient(
    ratio: float, advantage: float, low: float, high: float
) -> None:
    """Eq 21. The clip fraction that is logged is that of the surrogate that is optimised."""
    rho = f64(ratio).requires_grad_()
    policy.clipped_surrogate(rho, f64(advantage), low, high).backward()
    assert rho.grad is not None
    at_a_bound = ratio in (1 - low, 1 + high)
    silent = float(rho.grad) == 0.0 and advantage != 0.0
    assert at_a_bound or bool(policy.clipped(rho, f64(advantage), low, high)) is silent


def test_penalized() -> None:
    """Eq 21; ERPO eq 5. 1.2 - 0.1 * 0.5."""
    close(policy.penalized(f64(1.2), f64(0.5), 0.1), 1.15)


def objective(
    new: Tensor,
    old: Tensor,
    other: Tensor,
    segments: Tensor,
    advantages: Tensor,
    low: float,
    high: float,
    kl_coef: float,
) -> Tensor:
    """J of one group, put together as `e3rl.objectives.e3rl` does."""
    count = advantages.shape[-1]
    ratios = policy.ratios(policy.segment_log_ratios(new, old, segments, count))
    exists = policy.segment_sums(torch.ones_like(new), segments, count) > 0
    kl = policy.k3_kl(new, other).where(segments >= 0, 0.0)
    each = policy.segment_objective(policy.clipped_surrogate(ratios, advantages, low, high), exists, kl, kl_coef)
    return policy.group_mean(each, torch.full((len(new),), len(new)), groups=1)


def test_objective_by_hand() -> None:
    """Eq 21. Two siblings, the second without segment 1.

    Sibling 0: rho = 0.3/0.25 = 1.2 with A 1 gives 1.2; rho = 0.5 with A -1, clipped at 0.75, gives -0.75.
    Sibling 1: rho = 1.4 with A 2, clipped at 1.25, gives 2.5; its A of 5 in the missing segment counts nothing.
    KL: one token with the reference twice as likely, 1 - ln 2. J = ((1.2 - 0.75) + 2.5 - 0.1 (1 - ln 2)) / 2.
    """
    new, old = f64([[0.6, 0.5, 0.25], [0.7, 0.9, 0.9]]).log(), f64([[0.5] * 3, [0.5] * 3]).log()
    other = f64([[0.6, 0.5, 0.5], [0.7, 0.1, 0.1]]).log()
    segments, advantages = torch.tensor([[0, 0, 1], [0, -1, -1]]), f64([[1.0, -1.0], [2.0, 5.0]])
    close(objective(new, old, other, segments, advantages, 0.25, 0.25, 0.1), (2.95 - 0.1 * (1 - log(2))) / 2)


def test_group_mean() -> None:
    """Eq 21. Groups of two and of one: ((3 + 5) / 2 + 6) / 2; a part of the step's sequences gives its part of that."""
    values, sizes = f64([3.0, 5.0, 6.0]), torch.tensor([2, 2, 1])
    close(policy.group_mean(values, sizes, groups=2), 5.0)
    close(policy.group_mean(values[1:], sizes[1:], groups=2), 5.0 / 4 + 3.0)


@given(st.data(), segment_rows(), st.floats(0, 0.9), st.floats(0, 2), st.floats(0, 1))
def test_objective_agrees_with_the_reference(
    data: st.DataObject, rows: list[list[int]], low: float, high: float, kl_coef: float
) -> None:
    """Eq 21-22. Against plain Python, on ragged groups."""
    size = (len(rows), len(rows[0]))
    new, old, other = (data.draw(matrix(*size, st.floats(-3, 0))) for _ in range(3))
    advantages = data.draw(matrix(len(rows), num_segments(rows), st.floats(-2, 2)))
    found = objective(f64(new), f64(old), f64(other), torch.tensor(rows), f64(advantages), low, high, kl_coef)
    expected = reference.objective(new, old, other, rows, advantages, low, high, kl_coef)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_objective_gradient_is_numerically_right() -> None:
    """Eq 21-22. Finite differences, with a clipped, an unclipped and a missing segment, away from the kinks."""
    new = f64([[0.6, 0.5, 0.2], [0.7, 0.9, 0.9]]).log().requires_grad_()
    old, other = f64([[0.5] * 3, [0.5] * 3]).log(), f64([[0.4] * 3, [0.3] * 3]).log()
    segments, advantages = torch.tensor([[0, 0, 1], [0, -1, -1]]), f64([[1.0, 1.0], [2.0, 5.0]])
    assert torch.autograd.gradcheck(
        lambda logprobs: objective(logprobs, old, other, segments, advantages, 0.25, 0.25, 0.3), (new,)
    )


def test_objective_gradient_at_the_old_policy_is_the_policy_gradient() -> None:
    """Eq 21-22. With rho = 1 and no KL, dJ/dlog pi_t is the token's segment advantage divided by G."""
    new = f64([[-1.0, -2.0, -0.5], [-0.3, -1.0, -1.0]]).requires_grad_()
    segments, advantages = torch.tensor([[0, 0, 1], [0, -1, -1]]), f64([[1.0, -4.0], [2.0, 5.0]])
    same = new.detach()
    objective(new, same, same, segments, advantages, 0.2, 0.2, 0.0).backward()
    assert new.grad is not None
    close(new.grad, [[0.5, 0.5, -2.0], [1.0, 0.0, 0.0]])
