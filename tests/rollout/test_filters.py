"""Which groups are trained on, by rule and by value, and which prompts take the place of dropped ones."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from e3rl.config import FilterConfig
from e3rl.errors import UserError
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
