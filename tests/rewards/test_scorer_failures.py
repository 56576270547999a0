"""What a reward function gets wrong makes its rewards missing, never zero, and is named."""

from __future__ import annotations

import math
from typing import Any

import pytest

from e3rl.config import RewardsConfig
from e3rl.errors import UserError
from e3rl.rewards.scorer import Scorer, require_some
from tests.rewards.build import TEXTS, TWO, score, values


def broken(kind: str) -> Any:
    def reward(completions: Any) -> Any:
        if kind == "raise":
            raise RuntimeError("out of order")
        return {
            "short": [1.0],
            "number": 1.0,
            "string": "ab",
            "none": None,
            "dict": {"a": 1, "b": 2},
            "strings": ["1", "2"],
            "nan": [math.nan, math.inf],
            "objects": [object(), [1]],
            "complex": [1j, 2j],
        }[kind]

    return reward


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("raise", "raised RuntimeError: out of order (test_scorer_failures.py:19)"),
        ("short", "returned 1 values for 2 completions"),
        ("number", "returned float, not a list of 2 numbers"),
        ("string", "returned str, not a list of 2 numbers"),
        ("none", "returned NoneType, not a list of 2 numbers"),
        ("dict", "returned dict, not a list of 2 numbers"),
        ("strings", "returned str, not a number"),
        ("nan", "returned nan"),
        ("objects", "returned object, not a number"),
        ("complex", "returned complex, not a number"),
    ],
)
def test_failures(kind: str, error: str) -> None:
    good = lambda completions: [1.0, 1.0]  # noqa: E731
    with Scorer(RewardsConfig(), functions=[broken(kind), good]) as scorer:
        rewards = scorer.score(TWO, TEXTS)
        assert values(rewards) == [None, None]
        assert rewards[0].error == f"reward: {error}"
        assert dict(rewards[0].parts) == {"reward": None, "<lambda>": 1.0}
        assert (scorer.counters.scored, scorer.counters.missing) == (2, 2)
        assert scorer.counters.errors == {"reward": 2}
        assert scorer.counters.first_errors == {"reward": error}
        with pytest.raises(UserError, match=r"all 2 rewards of this batch are missing\. The first: reward: "):
            require_some(rewards)


def test_only_the_items_concerned_are_missing() -> None:
    rewards = score(lambda completions: [math.nan, 1.0])
    assert values(rewards) == [None, 1.0]
    require_some(rewards)


def test_a_missing_column_is_named() -> None:
    def reward(completions: Any, ground_truth: Any) -> list[float]:
        return []

    error = score(reward)[0].error
    assert error is not None
    assert "it needs ground_truth; the data has the columns id, level, solution, answer" in error


def test_async_failures() -> None:
    async def reward(completions: Any) -> list[float]:
        raise OSError("no route")

    assert str(score(reward)[1].error).startswith("reward: raised OSError: no route (test_scorer_failures.py:")


def test_nothing_to_score_and_mismatched_texts() -> None:
    async def late(completions: Any) -> list[float]:
        return [1.0]

    with Scorer(RewardsConfig(), functions=[late]) as scorer:
        assert scorer.score([], []) == []
        with pytest.raises(ValueError, match="1 texts for 2 trajectories"):
            scorer.score(TWO, ["x"])


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (1e308, "returned 1e+308; a reward may be 1e+15 at most"),
        (-1e16, "returned -1e+16; a reward may be 1e+15 at most"),
        (10**400, "returned what is not a number: int too large to convert to float"),
        (10**20, "returned 1e+20; a reward may be 1e+15 at most"),
    ],
)
def test_rewards_too_large_to_compare_are_missing(value: float, error: str) -> None:
    def large(completions: Any) -> list[float]:
        return [value, 1.0]

    rewards = score(large)
    assert rewards[0].error == f"large: {error}"
    assert rewards[1].value == 1.0


def test_a_weighted_sum_too_large_is_missing() -> None:
    def large(completions: Any) -> list[float]:
        return [1e15, 1.0]

    with Scorer(RewardsConfig(weights=(100.0,)), functions=[large]) as scorer:
        rewards = scorer.score(TWO, ["", ""])
    assert [r.value for r in rewards] == [None, 100.0]
    assert rewards[0].error == "the weighted sum is 1e+17; a reward may be 1e+15 at most"
