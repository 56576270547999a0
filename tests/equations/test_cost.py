"""Eq 27-35."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.equations.erasure import regeneration_ratio
from e3rl.types import (
    Candidate,
    Erasure,
    Judgement,
    Problem,
    Prompt,
    Segment,
    Threshold,
    Trajectory,
    Uncertainty,
    Verdict,
)
from tests.equations import costs

sizes = st.integers(1, 500)


def test_language_model_cost() -> None:
    """Eq 27. M 2, T 3, d 5: 2 * 9 * 5 + 2 * 3 * 25 = 240."""
    assert costs.language_model_cost(layers=2, tokens=3, width=5) == 240


def test_grpo_cost() -> None:
    """Eq 28. Four siblings of 240."""
    assert costs.grpo_cost(siblings=4, layers=2, tokens=3, width=5) == 960


def test_entropy_cost() -> None:
    """Eq 29. 4 * 3 * 7."""
    assert costs.entropy_cost(siblings=4, tokens=3, vocabulary=7) == 84


def test_segment_cost() -> None:
    """Eq 30. 4 * 3 * 2."""
    assert costs.segment_cost(siblings=4, segments=3, window=2) == 24


def test_regeneration_ratio() -> None:
    """Eq 31. Three erased segments of 4 tokens in a response of 16: l e / T = 12 / 16; nothing erased is 0."""
    assert regeneration_ratio(3 * 4, 16) == 0.75
    assert regeneration_ratio(0, 16) == 0.0


def test_regeneration_ratio_of_a_trajectory() -> None:
    """Eq 31. The counts that a trajectory keeps: 2 tokens erased, 3 committed."""

    def candidate(*ids: int) -> Candidate:
        return Candidate(ids, *[(0.0,) * len(ids)] * 4, (1,) * len(ids), ended=False)

    judgement = Judgement(Uncertainty(3, 3, 0, 0, 0, 3), Threshold(2, 2, 1, 1), 0, Verdict.ERASE)
    trajectory = Trajectory(
        prompt=Prompt(Problem("p", "?"), (1,)),
        sibling=0,
        segments=(Segment(0, candidate(5, 6), None), Segment(1, candidate(7), None)),
        erasures=(Erasure(0, 0, candidate(8, 9), judgement),),
        finish="stop",
    )
    assert regeneration_ratio(trajectory.erased_tokens, trajectory.committed_tokens) == pytest.approx(2 / 3)


def test_erasure_cost() -> None:
    """Eq 32. A quarter regenerated: 960 / 4."""
    assert costs.erasure_cost(0.25, siblings=4, layers=2, tokens=3, width=5) == 240


def test_e3rl_cost() -> None:
    """Eq 33. 960 + 240 + 84 + 24."""
    found = costs.e3rl_cost(0.25, siblings=4, layers=2, tokens=3, width=5, vocabulary=7, segments=3, window=2)
    assert found == 1308


def test_relative_cost() -> None:
    """Eq 34. 1 + 0.25 + (7 + 2/1) / (2 * (15 + 25)) = 1.3625, which is 1308 / 960."""
    found = costs.relative_cost(0.25, layers=2, tokens=3, width=5, vocabulary=7, segment_length=1, window=2)
    assert found == pytest.approx(1.3625)
    assert found == pytest.approx(1308 / 960)


@given(st.floats(0, 5), sizes, sizes, sizes, sizes, sizes, sizes, st.integers(0, 9))
def test_relative_cost_is_the_quotient(
    ratio: float, siblings: int, layers: int, segments: int, size: int, width: int, vocabulary: int, window: int
) -> None:
    """Eq 28, 33-34. With T = N l it is exactly C_E3RL / C_GRPO, and at least 1 + r."""
    tokens = segments * size
    whole = costs.e3rl_cost(ratio, siblings, layers, tokens, width, vocabulary, segments, window)
    found = costs.relative_cost(ratio, layers, tokens, width, vocabulary, size, window)
    assert found == pytest.approx(whole / costs.grpo_cost(siblings, layers, tokens, width))
    assert found >= 1 + ratio


def test_the_papers_setup_costs_one_plus_r() -> None:
    """Eq 34. App. D's shape, with Qwen3-4B's 36 layers, width 2560 and vocabulary 151,936: overhead below 0.02 %."""
    overhead = costs.relative_cost(0.3, 36, 8 * 1024, 2560, 151_936, 1024, 1) - 1.3
    assert 0 < overhead < 2e-4


def test_memory_cost() -> None:
    """Eq 35. 4 * 2 * 3 * 5 + 4 * 3 = 132; doubling the tokens doubles the first term only."""
    assert costs.memory_cost(siblings=4, layers=2, tokens=3, width=5, segments=3) == 132
    assert costs.memory_cost(siblings=4, layers=2, tokens=6, width=5, segments=3) == 252
