"""Which groups are trained on, and the loop that rolls out more: by rule, by value, and never the same prompt twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.config import FilterConfig
from e3rl.data.stream import PromptStream
from e3rl.errors import UserError
from e3rl.rollout.filters import (
    FILTERS,
    Collected,
    build_filter,
    collect,
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


class World:
    """A stream over ``size`` problems, of which those in ``good`` give groups with unequal rewards."""

    def __init__(self, size: int, good: Callable[[int], bool]) -> None:
        prompts = [Prompt(Problem(str(i), str(i)), (2,)) for i in range(size)]
        self.size, self.stream, self.good, self.rounds = size, PromptStream(prompts, seed=1), good, list[list[str]]()

    def make(self, prompts: Sequence[Prompt]) -> list[RewardedGroup]:
        names = [p.problem.id for p in prompts]
        self.rounds.append(names)
        return [rewarded(name, [1.0, 0.0 if self.good(int(name)) else 1.0]) for name in names]

    def collect(self, wanted: int, max_refills: int, name: str = "nonzero_spread") -> Collected:
        return collect(wanted, self.stream.take, self.make, FILTERS[name], max_refills=max_refills, available=self.size)


def names(groups: Sequence[RewardedGroup]) -> list[str]:
    return [item.group.prompt.problem.id for item in groups]


def test_without_a_filter_a_step_is_one_round_of_the_streams_prompts():
    world, expected = World(10, lambda i: False), World(10, lambda i: False).stream.take(4)
    collected = world.collect(4, max_refills=8, name="none")
    assert names(collected.kept) == [p.problem.id for p in expected]
    assert (collected.dropped, collected.refills, collected.dropped_tokens) == ((), 0, 0)


def test_a_refill_asks_for_as_many_groups_as_are_missing():
    world = World(100, lambda i: i % 3 == 0)
    collected = world.collect(6, max_refills=50)
    missing = 6
    for made in world.rounds:
        assert len(made) == missing
        missing -= sum(int(name) % 3 == 0 for name in made)
    assert (len(collected.kept), missing) == (6, 0)
    assert collected.refills == len(world.rounds) - 1 > 0
    assert collected.dropped_tokens == 6 * len(collected.dropped)  # two siblings of three tokens
    assert names(collected.all) == names(collected.kept) + names(collected.dropped)


@pytest.mark.parametrize("max_refills", [0, 1, 3])
def test_the_number_of_refills_is_bounded(max_refills: int):
    world = World(100, lambda i: False)
    collected = world.collect(5, max_refills)
    assert (len(collected.kept), len(collected.dropped), collected.refills) == (0, 5 * (max_refills + 1), max_refills)


def test_with_every_problem_tried_the_step_goes_on_with_what_there_is():
    world = World(7, lambda i: i in (2, 5))
    collected = world.collect(3, max_refills=50)
    assert sorted(names(collected.kept)) == ["2", "5"]
    assert sorted(names(collected.all)) == [str(i) for i in range(7)]


def test_a_prompt_that_the_next_epoch_has_last_is_still_found():
    """Three that were tried are left of this epoch, and the one that was not stands at the end of the next."""
    left = iter(Prompt(Problem(name, name), (2,)) for name in "bcaabcdd")
    found = fresh_prompts(lambda n: [next(left) for _ in range(n)], 1, {"a", "b", "c"}, available=4)
    assert [p.problem.id for p in found] == ["d"]
    assert len(list(left)) == 1


@given(size=st.integers(4, 12), good=st.sets(st.integers(0, 11)), wanted=st.integers(1, 4), steps=st.integers(1, 5))
def test_a_step_never_holds_a_problem_twice_and_keeps_what_passes(size: int, good: set[int], wanted: int, steps: int):
    world = World(size, lambda i: i in good)
    for _ in range(steps):
        collected = world.collect(wanted, max_refills=20)
        found = names(collected.all)
        assert len(found) == len(set(found))
        assert {int(n) for n in names(collected.kept)} == {int(n) for n in found} & good
        assert len(collected.kept) == wanted or len(found) == size or collected.refills == 20


def test_the_streams_position_alone_decides_what_a_step_holds():
    world, again = World(9, lambda i: i % 2 == 0), World(9, lambda i: i % 2 == 0)
    world.collect(4, max_refills=9)
    again.stream.restore(world.stream.state())
    assert names(world.collect(4, max_refills=9).all) == names(again.collect(4, max_refills=9).all)
