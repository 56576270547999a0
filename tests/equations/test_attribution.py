"""Eq 19."""

from __future__ import annotations

from math import nan

import torch
from hypothesis import given
from hypothesis import strategies as st

from e3rl.equations import attribution
from tests.equations import reference
from tests.equations.support import close, f64, matrix, num_segments, segment_rows

attention = st.floats(0.001, 1)


def test_token_attribution_averages_the_queries() -> None:
    """Eq 19. (0.1 + 0.3)/2, (0.2 + 0.2)/2, (0.6 + 0)/2; with one query (L' = 1) the row itself."""
    close(attribution.token_attribution(f64([[0.1, 0.2, 0.6], [0.3, 0.2, 0.0]])), [0.2, 0.2, 0.3])
    close(attribution.token_attribution(f64([[0.1, 0.9]])), [0.1, 0.9])


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
    """Eq 19. Attention 1 + 2 and 1 + 4 of Z = 8, reward 2: 2 * 3/8 and 2 * 5/8; a segment that is not there gets 0."""
    rewards = attribution.segment_rewards(
        2.0, f64([1.0, 2.0, 1.0, 4.0, 100.0]), torch.tensor([0, 0, 1, 1, -1]), num_segments=3
    )
    close(rewards, [0.75, 1.25, 0.0])
    close(attribution.segment_rewards(-1.0, f64([0.3]), torch.tensor([0]), 1), [-1.0])
    close(attribution.segment_rewards(0.0, f64([0.3, 0.1]), torch.tensor([0, 1]), 2), [0.0, 0.0])


def test_segment_rewards_of_a_group() -> None:
    """Eq 19. One reward per row."""
    rows = f64([[1.0, 3.0], [1.0, 1.0]])
    rewards = attribution.segment_rewards(f64([4.0, 2.0]), rows, torch.tensor([[0, 1], [0, 0]]), 2)
    close(rewards, [[1.0, 3.0], [2.0, 0.0]])


@given(st.data(), segment_rows(siblings=1), st.floats(-2, 2), st.integers(1, 4))
def test_segment_rewards_agree_with_the_reference(
    data: st.DataObject, rows: list[list[int]], reward: float, queries: int
) -> None:
    """Eq 19. Against plain Python; the segments' rewards add up to the response's."""
    paid = data.draw(matrix(queries, len(rows[0]), attention))
    found = attribution.segment_rewards(
        reward, attribution.token_attribution(f64(paid)), torch.tensor(rows[0]), num_segments(rows)
    )
    close(found, reference.segment_rewards(reward, paid, rows[0], num_segments(rows)))
    close(found.sum(), reward)


@given(st.data(), segment_rows())
def test_shares_add_up_to_one(data: st.DataObject, rows: list[list[int]]) -> None:
    """Eq 19. Over every response, and the scale of the attention does not matter."""
    paid, mask = f64(data.draw(matrix(len(rows), len(rows[0]), attention))), torch.tensor(rows) >= 0
    shares = attribution.attention_shares(paid, mask)
    close(shares.sum(-1), [1.0] * len(rows))
    close(attribution.attention_shares(7 * paid, mask), shares.tolist())
    assert (shares[~mask] == 0).all()
