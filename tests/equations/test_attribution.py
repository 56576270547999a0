"""Eq 19."""

from __future__ import annotations

from math import nan

import torch
from hypothesis import given
from hypothesis import strategies as st

from e3rl.equations import attribution
from e3rl.equations.policy import segment_sums
from tests.equations import reference
from tests.equations.support import close, f64, matrix, num_segments, segment_rows

attention = st.floats(0.001, 1)


def test_token_attribution_averages_queries_and_heads() -> None:
    """Eq 19. Two heads, two queries: a quarter of each row's softmax; a response with one query takes that one alone."""
    rows = f64([[[0.1, 0.2, 0.7], [0.3, 0.7, 0.0]], [[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]])
    scores = torch.stack([rows.log(), rows.log()])
    paid = attribution.token_attribution(scores, f64([[0.5, 0.5], [1.0, 0.0]]))
    close(paid, [[1.9 / 4, 1.15 / 4, 0.95 / 4], [0.3, 0.225, 0.475]])


def test_attention_shares() -> None:
    """Eq 19. 1, 2, 5 of 8; padding has no share, whatever stands in it."""
    shares = attribution.attention_shares(f64([1.0, 2.0, 5.0, nan]), torch.tensor([True, True, True, False]))
    close(shares, [0.125, 0.25, 0.625, 0.0])
    rows = attribution.attention_shares(f64([[3.0, 1.0], [0.2, 9.0]]), torch.tensor([[True, True], [True, False]]))
    close(rows, [[0.75, 0.25], [1.0, 0.0]])


def test_attention_shares_without_any_attention() -> None:
    """Eq 19. Nothing to tell the tokens apart: equal shares, not NaN."""
    close(attribution.attention_shares(f64([0.0, 0.0, 0.0]), torch.tensor([True, True, False])), [0.5, 0.5, 0.0])


def test_segment_rewards_by_hand() -> None:
    """Eq 19. Shares 3/8 and 5/8 of a reward of 2; a segment that is not there gets 0; a punishment is divided too."""
    shares = f64([[0.375, 0.625], [1.0, 0.0]])
    close(attribution.segment_rewards(f64([2.0, -1.0]), shares), [[0.75, 1.25], [-1.0, 0.0]])


@given(st.data(), segment_rows(siblings=1), st.floats(-2, 2), st.integers(1, 4))
def test_segment_rewards_agree_with_the_reference(
    data: st.DataObject, rows: list[list[int]], reward: float, queries: int
) -> None:
    """Eq 19. From attention logits of one head to R_n, against plain Python; they add up to the response's reward."""
    logits = data.draw(matrix(queries, len(rows[0]), st.floats(-3, 3)))
    segments, count = torch.tensor(rows), num_segments(rows)
    paid = attribution.token_attribution(f64([[logits]]), torch.full((1, queries), 1 / queries, dtype=torch.float64))
    shares = segment_sums(attribution.attention_shares(paid, segments >= 0), segments, count)
    found = attribution.segment_rewards(f64([reward]), shares)[0]
    attention = [reference.probabilities(row) for row in logits]
    close(found, reference.segment_rewards(reward, attention, rows[0], count))
    close(found.sum(), reward)


@given(st.data(), segment_rows())
def test_shares_add_up_to_one(data: st.DataObject, rows: list[list[int]]) -> None:
    """Eq 19. Over every response, and the scale of the attention does not matter."""
    paid, mask = f64(data.draw(matrix(len(rows), len(rows[0]), attention))), torch.tensor(rows) >= 0
    shares = attribution.attention_shares(paid, mask)
    close(shares.sum(-1), [1.0] * len(rows))
    close(attribution.attention_shares(7 * paid, mask), shares.tolist())
    assert (shares[~mask] == 0).all()
