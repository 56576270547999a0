"""Which groups are trained on, by rule and by value, and which prompts take the place of dropped ones."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from e3rl.cli.recipes import find_recipe
from e3rl.config import FilterConfig, load_config
from e3rl.errors import UserError
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.filters import (
    FILTERS,
    build_filter,
    fresh_prompts,
    mixed_accuracy,
    nonzero_spread,
)
from e3rl.types import Group, Problem, Prompt, Reward, RewardedGroup
from tests.train.rollouts import trajectory


def rewarded(name: str, values: Sequence[float | None], parts: Sequence[float | None] | None = None) -> RewardedGroup:
    """A group of siblings of 3 tokens with these rewards, and these values of the first reward function."""
    prompt = Prompt(Problem(name, name), (2,))
    siblings = tuple(trajectory(prompt, i, [3], [], Random(i)) for i in range(len(values)))
    pairs = zip(values, parts or values, strict=True)
    return RewardedGroup(Group(prompt, siblings, 0), tuple(Reward(v, {"first": p, "other": 0.5}) for v, p in pairs))


@pytest.mark.parametrize(
    ("values", "spread"),
    [([1.0, 0.0], True), ([1.0, 1.0], False), ([0.0, 0.0], False), ([1.0, None], False), ([None, None], False),
     ([None, 0.2, 0.3], True), ([1.0], False)],
)  # fmt: skip
def test_nonzero_spread_keeps_groups_with_two_different_known_rewards(values: list[float | None], spread: bool):
    assert nonzero_spread(rewarded("p", values)) is spread


def test_mixed_accuracy_looks_at_the_first_function_whatever_others_add():
    wrong_but_of_different_length = rewarded("p", [-0.1, -0.9], parts=[0.0, 0.0])
    assert nonzero_spread(wrong_but_of_different_length)
    assert not mixed_accuracy(wrong_but_of_different_length)
    assert mixed_accuracy(rewarded("p", [0.5, 0.5], parts=[1.0, 0.0]))
    assert not mixed_accuracy(rewarded("p", [0.5, 0.5], parts=[1.0, None]))
    assert not mixed_accuracy(rewarded("p", [0.5, 0.0], parts=[0.5, 0.0])), "partly right is not right"


@pytest.mark.parametrize(
    ("solved", "lengths", "kept"),
    [
        ([True, True], [30, 100], False),  # all right; one is punished for its length, so the rewards differ
        ([False, False], [30, 90], False),  # all wrong, likewise
        ([True, False], [30, 30], True),
        ([True, False], [100, 30], True),  # right and too long, wrong and short: rewards 0 and 0
    ],
)
def test_dapo_drops_groups_that_are_all_right_or_all_wrong_whatever_their_lengths(
    solved: list[bool], lengths: list[int], kept: bool
):
    config = load_config(overlays=[find_recipe("methods/dapo")])
    prompt = Prompt(Problem("p", "p"), (2,))
    siblings = [trajectory(prompt, i, [size], [], Random(i)) for i, size in enumerate(lengths)]

    def answers(completions: Sequence[str], **columns: object) -> list[float]:
        return [float(text == "right") for text in completions]

    with Scorer(config.rewards, functions=[answers], max_completion_length=100) as scorer:
        rewards = scorer.score(siblings, ["right" if good else "wrong" for good in solved])
    punished = {30: 0.0, 90: -0.5, 100: -1.0}
    assert [r.value for r in rewards] == [good + punished[size] for good, size in zip(solved, lengths, strict=True)]
    assert [r.right for r in rewards] == solved
    assert build_filter(config.filter)(RewardedGroup(Group(prompt, tuple(siblings), 0), tuple(rewards))) is kept


def test_a_reward_without_an_answer_checker_is_neither_right_nor_wrong():
    assert Reward(0.5, {"math": None, "overlong": 0.5}).right is None
    assert Reward(None, {}, "failed").right is None
    assert Reward(2.0, {"math": 1.0}).right is True
    assert Reward(0.9, {"math": 0.9, "format": 1.0}).right is False


def test_an_unknown_filter_suggests_the_nearest():
    with pytest.raises(UserError, match=r"unknown filter 'nonzero_spred'. Did you mean 'nonzero_spread'"):
        build_filter(FilterConfig("nonzero_spred"))
    assert build_filter(FilterConfig()) is FILTERS["none"]


def test_a_prompt_that_the_next_epoch_has_last_is_still_found():
    """Three that were tried are left of this epoch, and the one that was not stands at the end of the next."""
    left = iter(Prompt(Problem(name, name), (2,)) for name in "bcaabcdd")
    found = fresh_prompts(lambda n: [next(left) for _ in range(n)], 1, {"a", "b", "c"}, available=4)
    assert [p.problem.id for p in found] == ["d"]
    assert len(list(left)) == 1
