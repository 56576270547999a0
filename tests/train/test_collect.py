"""Prompts to rewarded groups: filters, refills, and never the same prompt twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.cluster.ranks import Ranks
from e3rl.config import Config, FilterConfig
from e3rl.data.stream import PromptStream
from e3rl.errors import UserError
from e3rl.rollout.filters import build_filter
from e3rl.rollout.group import GroupSettings
from e3rl.train.collect import Arriving, Prefetch, StepGroups, collect, in_rounds, pack_groups, unpack_groups
from e3rl.train.listeners import Interrupted
from e3rl.types import Group, Problem, Prompt, Reward, RewardedGroup, Trajectory
from tests.rollout.test_filters import rewarded


class World:
    """A stream over ``size`` problems, of which those in ``good`` give groups with unequal rewards."""

    def __init__(self, size: int, good: Callable[[int], bool]) -> None:
        prompts = [Prompt(Problem(str(i), str(i)), (2,)) for i in range(size)]
        self.stream, self.good, self.rounds = PromptStream(prompts, seed=1), good, list[list[str]]()
        self.run: Any = SimpleNamespace(
            data=SimpleNamespace(train=prompts, demonstrations={}),
            policy=SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda *_, **__: "")),
            rollouts=SimpleNamespace(run=self.roll_out),
            scorer=self,
            ranks=Ranks(),
            remote=False,
            tell=lambda *_: None,
            note=lambda _: None,
        )

    def roll_out(self, prompts: Sequence[Prompt], _: GroupSettings, tick: Callable[[], None]) -> Iterator[Group]:
        self.rounds.append([p.problem.id for p in prompts])
        for name in reversed(self.rounds[-1]):  # groups come in any order
            tick()
            yield rewarded(name, [1.0, 1.0]).group

    def score(self, trajectories: Sequence[Trajectory], texts: Sequence[str]) -> list[Reward]:
        values = [0.0 if t.sibling and self.good(int(t.prompt.problem.id)) else 1.0 for t in trajectories]
        return [Reward(value, {"first": value}) for value in values]

    def collect(
        self, wanted: int, max_refills: int, name: str = "nonzero_spread", tick: Callable[[], None] = lambda: None
    ) -> StepGroups:
        config = Config(filter=FilterConfig(name, max_refills))
        self.run.config = replace(config, train=replace(config.train, prompts_per_step=wanted))
        self.run.keep = build_filter(config.filter)
        settings = GroupSettings(config.rollout, config.erasure, 0, step=1, policy_version=0)
        return collect(self.run, self.stream, settings, tick)


def names(groups: Sequence[RewardedGroup]) -> list[str]:
    return [item.group.prompt.problem.id for item in groups]


def test_without_a_filter_a_step_is_one_round_of_the_streams_prompts():
    world, expected = World(10, lambda i: False), World(10, lambda i: False).stream.take(4)
    groups = world.collect(4, max_refills=8, name="none")
    assert names(groups.kept) == [p.problem.id for p in expected]
    assert (groups.dropped, groups.refills, groups.dropped_tokens) == ((), 0, 0)


def test_a_refill_asks_for_as_many_groups_as_are_missing():
    world = World(100, lambda i: i % 3 == 0)
    groups = world.collect(6, max_refills=50)
    missing = 6
    for made in world.rounds:
        assert len(made) == missing
        missing -= sum(int(name) % 3 == 0 for name in made)
    assert (len(groups.kept), missing) == (6, 0)
    assert groups.refills == len(world.rounds) - 1 > 0
    assert groups.dropped_tokens == 6 * len(groups.dropped)  # two siblings of three tokens
    assert names(groups.all) == names(groups.kept) + names(groups.dropped)


@pytest.mark.parametrize("max_refills", [0, 1, 3])
def test_the_number_of_refills_is_bounded(max_refills: int):
    world = World(100, lambda i: False)
    groups = world.collect(5, max_refills)
    assert (len(groups.kept), len(groups.dropped), groups.refills) == (0, 5 * (max_refills + 1), max_refills)


def test_with_every_problem_tried_the_step_goes_on_with_what_there_is():
    world = World(7, lambda i: i in (2, 5))
    groups = world.collect(3, max_refills=50)
    assert sorted(names(groups.kept)) == ["2", "5"]
    assert sorted(names(groups.all)) == [str(i) for i in range(7)]


@given(size=st.integers(4, 12), good=st.sets(st.integers(0, 11)), wanted=st.integers(1, 4), steps=st.integers(1, 5))
def test_a_step_never_holds_a_problem_twice_and_keeps_what_passes(size: int, good: set[int], wanted: int, steps: int):
    world = World(size, lambda i: i in good)
    for _ in range(steps):
        groups = world.collect(wanted, max_refills=20)
        found = names(groups.all)
        assert len(found) == len(set(found))
        assert {int(n) for n in names(groups.kept)} == {int(n) for n in found} & good
        assert len(groups.kept) == wanted or len(found) == size or groups.refills == 20


def test_the_streams_position_alone_decides_what_a_step_holds():
    world, again = World(9, lambda i: i % 2 == 0), World(9, lambda i: i % 2 == 0)
    world.collect(4, max_refills=9)
    again.stream.restore(world.stream.state())
    assert names(world.collect(4, max_refills=9).all) == names(again.collect(4, max_refills=9).all)


def test_a_stop_leaves_the_stream_where_it_was():
    world = World(9, lambda i: False)
    before, ticks = world.stream.state(), iter(range(6))

    def tick() -> None:
        if next(ticks) == 5:  # in the first refill
            raise Interrupted

    with pytest.raises(Interrupted):
        world.collect(3, max_refills=9, tick=tick)
    assert len(world.rounds) == 2
    assert world.stream.state() == before


def test_groups_come_back_from_a_checkpoint_in_their_order():
    world = World(6, good=lambda i: i < 3)
    steps = [world.collect(3, 5), world.collect(3, 5)]
    facts, content = pack_groups(steps)
    assert unpack_groups(world.run, json.loads(json.dumps(facts)), content) == steps
    assert steps[0].dropped
    assert unpack_groups(world.run, *pack_groups([])) == []


def test_prefetched_groups_of_an_earlier_version_are_refused():
    world = World(4, good=lambda _: True)
    facts, content = pack_groups([world.collect(2, 0)])
    run: Any = SimpleNamespace(path="runs/a", data=SimpleNamespace(train=world.run.data.train))
    assert len(unpack_groups(run, facts, content)) == 1
    with pa.ipc.open_stream(content) as reader:
        batches = [batch.drop_columns(["finish"]) for batch in reader]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        writer.write_batch(batches[0])
    elsewhere: Any = SimpleNamespace(path="runs/a", data=SimpleNamespace(train=[]))
    for bad in (
        (run, [{"kept": 0}], b""),  # nothing where there should be something
        (run, facts, sink.getvalue().to_pybytes()),  # other columns
        (run, [*facts, *facts], content),  # as many steps as there are not
        (run, [{"kept": 2}], content),  # facts that were not written then
        (elsewhere, facts, content),  # other problems
    ):
        with pytest.raises(
            UserError, match=r"runs/a holds prefetched rollouts in the format of an earlier version \(.*\): continue"
        ):
            unpack_groups(*bad)


class Pair(Ranks):
    """One of two ranks, each a thread of this process."""

    shared: tuple[list[Any], threading.Barrier]

    def gather(self, value: Any) -> list[Any]:
        values, barrier = self.shared
        values[self.rank] = value
        barrier.wait(20)
        found = list(values)
        barrier.wait(20)
        return found

    gather_bytes = gather


def both(act: Callable[[Pair], Any]) -> list[Any]:
    """What ``act`` gives for each of two ranks, which run at the same time; an exception where it raised one."""
    shared = [None, None], threading.Barrier(2)

    def one(rank: int) -> Any:
        ranks = Pair(rank, 2)
        object.__setattr__(ranks, "shared", shared)
        try:
            return act(ranks)
        except (UserError, threading.BrokenBarrierError) as error:
            shared[1].abort()
            return error

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(one, (0, 1)))


PROMPTS = [Prompt(Problem(str(i), str(i)), (2,)) for i in range(5)]


def made(prompts: Sequence[Prompt]) -> Iterator[Group]:
    return (rewarded(prompt.problem.id, [1.0, 1.0]).group for prompt in prompts)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_ranks_have_the_same_rounds_of_groups(elsewhere: bool):
    """One of each rank's at a time, or as many of those that the first rank gets from workers; in the order of the prompts."""

    def act(ranks: Pair) -> list[list[str]]:
        mine = (PROMPTS if ranks.first else []) if elsewhere else ranks.share(PROMPTS)
        rounds = in_rounds(ranks, PROMPTS, made(mine[::-1]), 2 if elsewhere else 1)
        return [[group.prompt.problem.id for group in groups] for groups in rounds]

    expected = [["3", "4"], ["1", "2"], ["0"]]
    assert both(act) == [expected, expected]


def test_a_rank_that_fails_to_generate_says_so_and_waits_for_nobody():
    def failing(prompts: Sequence[Prompt]) -> Iterator[Group]:
        yield from made(prompts[:1])
        raise UserError("no room")

    def act(ranks: Pair) -> list[list[Group]]:
        mine = ranks.share(PROMPTS)
        return list(in_rounds(ranks, PROMPTS, made(mine) if ranks.first else failing(mine), 1))

    other, failed = both(act)
    assert str(failed) == "no room"
    assert isinstance(other, threading.BrokenBarrierError)


def test_steps_are_complete_when_they_are_in_all_ranks():
    def act(ranks: Pair) -> tuple[int, int]:
        prefetch = Prefetch(Ranks())
        for step in range(3):
            future: Future[StepGroups] = Future()
            prefetch._coming.append(Arriving(lambda _, future=future: future, round_by_round=True))
            if step < 2 - ranks.rank:
                future.set_result(StepGroups(()))
        return len(prefetch.finished(ranks)), len(prefetch)

    assert both(act) == [(1, 2), (1, 2)]
