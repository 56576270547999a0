"""Eq 1-9, 21-22."""

from __future__ import annotations

from math import exp, inf, log, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e3rl.equations import policy
from tests.equations import reference
from tests.equations.support import close, distributions, f64, matrix, num_segments, segment_rows

logprobs = st.floats(-6, 0)


def test_sequence_logprob_is_the_log_of_the_product() -> None:
    """Eq 1. 0.5 * 0.25 * 0.8 = 0.1."""
    close(policy.sequence_logprob(f64([log(0.5), log(0.25), log(0.8)])), log(0.1))
    close(policy.sequence_logprob(f64([log(0.3)])), log(0.3))


def test_token_distribution_divides_by_the_temperature() -> None:
    """Eq 2-3. Logits 0 and 2 ln 3: at temperature 2 p = (1/4, 3/4), at temperature 1 p = (1/10, 9/10)."""
    embeddings = f64([[0.0, 5.0], [log(3), -7.0]])
    hidden = f64([2.0, 0.0])
    close(policy.token_distribution(hidden, embeddings, 2.0), [log(0.25), log(0.75)])
    close(policy.token_distribution(hidden[None], embeddings, 1.0), [[log(0.1), log(0.9)]])


@given(matrix(1, 3, st.floats(-4, 4)), matrix(5, 3, st.floats(-4, 4)), st.floats(0.1, 4))
def test_token_distribution_agrees_with_the_reference(
    hidden: list[list[float]], embeddings: list[list[float]], temperature: float
) -> None:
    """Eq 2-3. Against plain Python; probabilities add up to 1."""
    probabilities = policy.token_distribution(f64(hidden[0]), f64(embeddings), temperature).exp()
    close(probabilities, reference.token_distribution(hidden[0], embeddings, temperature))
    close(probabilities.sum(), 1.0)


def test_greedy_token_is_the_likeliest() -> None:
    """Eq 4."""
    assert policy.greedy_token(f64([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]).log()).tolist() == [1, 0]


def test_perturbation_is_the_gap_to_the_likeliest() -> None:
    """Eq 5. p = (1/2, 1/4, 1/4): 0 for the greedy token, ln 2 for another."""
    p = f64([0.5, 0.25, 0.25]).log()
    close(policy.perturbation(p, torch.tensor(0)), 0.0)
    close(policy.perturbation(p.expand(2, 3), torch.tensor([1, 0])), [log(2), 0.0])


@given(distributions(), st.integers(0, 11))
def test_perturbation_agrees_with_the_reference(row: list[float], pick: int) -> None:
    """Eq 5. Never negative, 0 for the greedy token, and the same from logits as from log-probabilities."""
    sampled = pick % len(row)
    found = policy.perturbation(torch.log_softmax(f64(row), -1), torch.tensor(sampled))
    close(found, reference.perturbation(row, sampled))
    assert found >= 0
    assert policy.perturbation(f64(row), policy.greedy_token(f64(row))) == 0


def test_cumulative_perturbation_adds_up() -> None:
    """Eq 6."""
    close(policy.cumulative_perturbation(f64([0.0, 0.5, 0.25])), [0.0, 0.5, 0.75])
    close(policy.cumulative_perturbation(f64([0.5])), [0.5])


@given(st.lists(st.floats(0, 20), min_size=1, max_size=20))
def test_cumulative_perturbation_agrees_with_the_reference(perturbations: list[float]) -> None:
    """Eq 6. E_1:k is the sum of the first k, and never falls."""
    found = policy.cumulative_perturbation(f64(perturbations))
    close(found, [sum(perturbations[: k + 1]) for k in range(len(perturbations))])
    assert (found.diff() >= 0).all()


def test_affected_positions_are_all_later_ones() -> None:
    """Eq 7."""
    assert list(policy.affected_positions(0, 3)) == [1, 2]
    assert list(policy.affected_positions(2, 3)) == []


@pytest.mark.parametrize(
    ("length", "size", "bounds"),
    [
        (10, 4, [(0, 4), (4, 8), (8, 10)]),
        (8, 4, [(0, 4), (4, 8)]),
        (1, 4, [(0, 1)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
        (0, 4, []),
    ],
)
def test_segment_bounds(length: int, size: int, bounds: list[tuple[int, int]]) -> None:
    """Eq 8. The last segment may be shorter."""
    assert policy.segment_bounds(length, size) == bounds


@given(st.integers(0, 60), st.integers(1, 20))
def test_segments_tile_the_response(length: int, size: int) -> None:
    """Eq 8. Non-overlapping, gapless, and all but the last exactly L long."""
    bounds = policy.segment_bounds(length, size)
    assert [t for start, stop in bounds for t in range(start, stop)] == list(range(length))
    assert all(stop - start == size for start, stop in bounds[:-1])


def test_segment_logprob() -> None:
    """Eq 9. Tokens 1..2: 0.25 * 0.8 = 0.2."""
    close(policy.segment_logprob(f64([0.5, 0.25, 0.8, 0.1]).log(), 1, 3), log(0.2))


@given(st.lists(logprobs, min_size=1, max_size=20), st.integers(1, 8))
def test_segments_factorise_the_sequence(row: list[float], size: int) -> None:
    """Eq 9. The segments' probabilities multiply to the sequence's, whichever way they are summed."""
    bounds = policy.segment_bounds(len(row), size)
    each = torch.stack([policy.segment_logprob(f64(row), start, stop) for start, stop in bounds])
    close(each.sum(), float(policy.sequence_logprob(f64(row))))
    segments = torch.arange(len(row)) // size
    close(policy.segment_sums(f64(row), segments, len(bounds)), each.tolist())


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


def test_objective_by_hand() -> None:
    """Eq 21. Two siblings, the second without segment 1.

    Sibling 0: rho = 0.3/0.25 = 1.2 with A 1 gives 1.2; rho = 0.5 with A -1, clipped at 0.75, gives -0.75.
    Sibling 1: rho = 1.4 with A 2, clipped at 1.25, gives 2.5; its A of 5 in the missing segment counts nothing.
    KL: one token with the reference twice as likely, 1 - ln 2. J = ((1.2 - 0.75) + 2.5 - 0.1 (1 - ln 2)) / 2.
    """
    new, old = f64([[0.6, 0.5, 0.25], [0.7, 0.9, 0.9]]).log(), f64([[0.5] * 3, [0.5] * 3]).log()
    other = f64([[0.6, 0.5, 0.5], [0.7, 0.1, 0.1]]).log()
    segments, advantages = torch.tensor([[0, 0, 1], [0, -1, -1]]), f64([[1.0, -1.0], [2.0, 5.0]])
    found = policy.objective(new, old, other, segments, advantages, clip_low=0.25, clip_high=0.25, kl_coef=0.1)
    close(found, (2.95 - 0.1 * (1 - log(2))) / 2)


@given(st.data(), segment_rows(), st.floats(0, 0.9), st.floats(0, 2), st.floats(0, 1))
def test_objective_agrees_with_the_reference(
    data: st.DataObject, rows: list[list[int]], low: float, high: float, kl_coef: float
) -> None:
    """Eq 21. Against plain Python, on ragged groups."""
    size = (len(rows), len(rows[0]))
    new, old, other = (data.draw(matrix(*size, st.floats(-3, 0))) for _ in range(3))
    advantages = data.draw(matrix(len(rows), num_segments(rows), st.floats(-2, 2)))
    found = policy.objective(
        f64(new),
        f64(old),
        f64(other),
        torch.tensor(rows),
        f64(advantages),
        clip_low=low,
        clip_high=high,
        kl_coef=kl_coef,
    )
    expected = reference.objective(new, old, other, rows, advantages, low, high, kl_coef)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_objective_gradient_is_numerically_right() -> None:
    """Eq 21-22. Finite differences, with a clipped, an unclipped and a missing segment, away from the kinks."""
    new = f64([[0.6, 0.5, 0.2], [0.7, 0.9, 0.9]]).log().requires_grad_()
    old, other = f64([[0.5] * 3, [0.5] * 3]).log(), f64([[0.4] * 3, [0.3] * 3]).log()
    segments, advantages = torch.tensor([[0, 0, 1], [0, -1, -1]]), f64([[1.0, 1.0], [2.0, 5.0]])

    def j(logprobs: torch.Tensor) -> torch.Tensor:
        return policy.objective(logprobs, old, other, segments, advantages, clip_low=0.25, clip_high=0.25, kl_coef=0.3)

    assert torch.autograd.gradcheck(j, (new,))


def test_objective_gradient_at_the_old_policy_is_the_policy_gradient() -> None:
    """Eq 21-22. With rho = 1 and no KL, dJ/dlog pi_t is the token's segment advantage divided by G."""
    new = f64([[-1.0, -2.0, -0.5], [-0.3, -1.0, -1.0]]).requires_grad_()
    segments, advantages = torch.tensor([[0, 0, 1], [0, -1, -1]]), f64([[1.0, -4.0], [2.0, 5.0]])
    same = new.detach()
    policy.objective(new, same, same, segments, advantages, clip_low=0.2, clip_high=0.2, kl_coef=0.0).backward()
    assert new.grad is not None
    close(new.grad, [[0.5, 0.5, -2.0], [1.0, 0.0, 0.0]])
