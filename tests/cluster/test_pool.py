"""Whatever happens to workers, the groups are those of one process, each once; and nothing waits for ever."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save

from e3rl.cluster.messages import Hello, decode_answer, encode_answer
from e3rl.cluster.open_groups import OpenGroups
from e3rl.cluster.pool import Place, WorkerLost
from e3rl.cluster.wire import decode, encode
from e3rl.errors import NonFiniteLogits, UserError
from e3rl.rollout.columns import SCHEMA
from e3rl.rollout.ipc import problem_of
from e3rl.types import Group
from tests.cluster.places import Broken, World, ids, lost_once
from tests.rollout.worlds import levels, roll


@pytest.fixture(scope="module")
def expected(world: World) -> list[Group]:
    groups = world.local()
    assert sum(len(t.erasures) for g in groups for t in g.trajectories) > 5
    return groups


@pytest.fixture(scope="module")
def two(world: World) -> list[Any]:
    return [world.worker(), world.worker()]


def entropies(groups: list[Group]) -> torch.Tensor:
    return torch.tensor([x for g in groups for t in g.trajectories for x in t.entropies])


def place(worker: Any, name: str = "w") -> Place:
    return Place(name, lambda: Broken(worker, lambda _, answer: answer()))


def broken(worker: Any, change: Callable[[int, Callable[[], bytes]], bytes], name: str = "broken") -> Place:
    return Place(name, lambda: Broken(worker, change))


@pytest.mark.parametrize("number", [1, 2])
def test_any_number_of_workers_gives_the_groups_of_one_process(world, expected, two, number):
    groups = world.run(world.pool(*(place(w, f"w{i}") for i, w in enumerate(two[:number]))))
    assert ids(groups) == ids(expected)
    assert [g.policy_version for g in groups] == [0] * len(groups)
    assert torch.allclose(entropies(groups), entropies(expected), atol=1e-5)


def test_both_workers_get_groups(world, two):
    """Neither answers before both were asked, so that no thread can come too late."""
    asked, meeting = {0: 0, 1: 0}, threading.Barrier(2, timeout=15)

    def counting(index: int) -> Callable[[int, Callable[[], bytes]], bytes]:
        def change(number: int, answer: Callable[[], bytes]) -> bytes:
            if number == 1:
                meeting.wait()
            body = answer()
            asked[index] += len(decode_answer(body)[1])
            return body

        return change

    world.run(world.pool(*(broken(w, counting(i), f"w{i}") for i, w in enumerate(two))))
    assert min(asked.values()) >= 1
    assert sum(asked.values()) == len(world.prompts)


def test_a_lost_workers_groups_are_made_again_once(world, expected, two):
    """The other one answers only after the loss, so that it can't have made every group before."""
    notes, lost, dies = list[str](), threading.Event(), lost_once(2)

    def dying(number: int, answer: Callable[[], bytes]) -> bytes:
        try:
            return dies(number, answer)
        except WorkerLost:
            lost.set()
            raise

    def waiting(_: int, answer: Callable[[], bytes]) -> bytes:
        assert lost.wait(15)
        return answer()

    pool = world.pool(broken(two[0], waiting, "good"), broken(two[1], dying))
    pool._note = notes.append
    assert ids(world.run(pool)) == ids(expected)
    assert len(notes) == 1
    assert "killed in the middle" in notes[0]


def test_a_worker_that_never_answers_again_is_given_up_and_the_others_go_on(world, expected, two):
    def dead(*_: Any) -> bytes:
        raise WorkerLost("connection refused")

    assert ids(world.run(world.pool(place(two[0]), broken(two[1], dead)))) == ids(expected)


def test_a_worker_that_gets_on_may_be_lost_any_number_of_times(world, expected, two):
    """It gives one group and dies, again and again: two losses in a row would end it, with a group between them they don't."""
    losses: list[int] = []

    def one_group() -> Callable[[int, Callable[[], bytes]], bytes]:
        given: list[str] = []

        def change(_: int, answer: Callable[[], bytes]) -> bytes:
            if given:
                losses.append(1)
                raise WorkerLost("out of memory")
            head, groups = decode_answer(answer())
            given.extend(map(problem_of, groups[:1]))
            return encode_answer(head, groups[:1])

        return change

    dying = Place("w", lambda: Broken(two[0], one_group()))
    assert ids(world.run(world.pool(dying, attempts=2))) == ids(expected)
    assert len(losses) == len(world.prompts) - 1


def test_with_no_worker_left_the_run_ends_and_says_why(world, two):
    def dead(*_: Any) -> bytes:
        raise WorkerLost("connection refused")

    with pytest.raises(UserError, match=r"no rollout worker is left.*connection refused"):
        world.run(world.pool(broken(two[0], dead, "a"), broken(two[1], dead, "b")))


def test_a_worker_that_generates_nothing_is_lost_in_bounded_time(world, expected, two):
    def hung(_: int, answer: Callable[[], bytes]) -> bytes:
        head, _ = decode_answer(answer())
        return encode_answer(dataclasses.replace(head, beat=7), [])

    began = time.monotonic()
    assert ids(world.run(world.pool(place(two[0]), broken(two[1], hung), timeout=0.5))) == ids(expected)
    assert time.monotonic() - began < 60


def _garbled(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[int, Callable[[], bytes]], bytes]:
    """Every group's rows are changed."""

    def through(_: int, answer: Callable[[], bytes]) -> bytes:
        head, groups = decode_answer(answer())
        rows = [group.to_pylist() for group in groups]
        for group in rows:
            change(group)
        return encode_answer(head, [pa.RecordBatch.from_pylist(group, schema=SCHEMA) for group in rows])

    return through


def _candidate(**fields: Callable[[int], list[float]]) -> Callable[[int, Callable[[], bytes]], bytes]:
    """A candidate of each group has other numbers, made from how many tokens it has."""

    def change(rows: list[dict[str, Any]]) -> None:
        candidate = rows[0]["segments"][0]
        size = len(candidate["ids"])
        candidate.update({name: make(size) for name, make in fields.items()})

    return _garbled(change)


def _another_run(_: int, answer: Callable[[], bytes]) -> bytes:
    head, groups = decode_answer(answer())
    return encode_answer(dataclasses.replace(head, run="x"), groups)


def _cut_short(_: int, answer: Callable[[], bytes]) -> bytes:
    body = answer()
    return body[: len(body) // 2] if len(body) > 1000 else body


GARBAGE = {
    "a web page": lambda _, answer: b"<html>502 Bad Gateway</html>",
    "another run": _another_run,
    "half of an answer": _cut_short,
    "another policy version": _garbled(lambda rows: [row.update(policy_version=9) for row in rows]),
    "a sibling too few": _garbled(lambda rows: rows.pop()),
    "tokens outside the vocabulary": _candidate(ids=lambda size: [10**6] * size),
    "fewer measures than tokens": _candidate(entropies=lambda size: []),
    "entropies of NaN": _candidate(entropies=lambda size: [float("nan")] * size),
    "groups nobody asked for": _garbled(lambda rows: [row.update(problem_id="stranger") for row in rows]),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_a_worker_that_answers_garbage_never_reaches_a_reward(world, expected, two, garbage):
    assert ids(world.run(world.pool(place(two[0]), broken(two[1], garbage)))) == ids(expected)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("e3rl", "0.0.1", "it runs e3rl 0.0.1"),
        ("protocol", 99, "protocol 99"),
        ("architecture", "of something else", "another architecture"),
        ("max_length", 5, "longer --longest-prompt"),
        ("rows", 1, "raise its rollout.cache_rows"),
    ],
)
def test_a_worker_that_does_not_fit_the_run_is_refused(world, two, field, value, message):
    connection = Broken(two[0], lambda _, answer: answer())
    hello = decode(Hello, two[0].hello())
    connection.hello = lambda: encode(dataclasses.replace(hello, **{field: value}))
    with pytest.raises(UserError, match=message):
        world.run(world.pool(Place("other", lambda: connection)))


def test_what_is_no_worker_is_said_to_be_none(world, two):
    connection = Broken(two[0], lambda _, answer: answer())
    connection.hello = lambda: b"220 mail.example ESMTP"
    with pytest.raises(UserError, match=r"no rollout worker of e3rl"):
        world.run(world.pool(Place("mail", lambda: connection)))


def test_new_weights_reach_every_worker_before_its_next_group(world, expected, two):
    pool = world.pool(*(place(w, f"w{i}") for i, w in enumerate(two)))
    other = {
        n: p.detach() + 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        for n, p in world.policy.trainable()
    }
    pool.load_weights(world.published(1, other))
    changed = dataclasses.replace(world.settings, policy_version=1)
    groups = world.sorted(pool.run(world.prompts, changed, lambda: None))
    assert ids(groups) != ids(expected)
    assert {g.policy_version for g in groups} == {1}
    pool.load_weights(world.published())
    assert ids(world.run(pool)) == ids(expected)


def test_rollouts_of_another_policy_version_are_refused(world, two):
    pool = world.pool(place(two[0]))
    with pytest.raises(UserError, match="version 3 were asked for; it holds 0"):
        list(pool.run(world.prompts, dataclasses.replace(world.settings, policy_version=3), lambda: None))


def test_broken_weights_are_named_by_their_draw(world, two):
    pool = world.pool(place(two[0]))
    # finite themselves, or a worker refuses them
    pool.load_weights(world.published(0, {n: torch.full_like(p, 1e38) for n, p in world.policy.trainable()}))
    with pytest.raises(NonFiniteLogits, match="of step 1"):
        world.run(pool)


def test_a_stop_ends_the_run_and_the_workers_can_be_used_again(world, expected, two):
    pool = world.pool(*(place(w, f"w{i}") for i, w in enumerate(two)))

    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        list(pool.run(world.prompts, world.settings, stop))
    assert ids(world.run(pool)) == ids(expected)


def test_a_problem_that_occurs_twice_is_refused(world, two):
    pool = world.pool(place(two[0]))
    with pytest.raises(UserError, match="occurs twice"):
        list(pool.run([*world.prompts, world.prompts[0]], world.settings, lambda: None))


def test_weights_that_do_not_fit_are_refused(world: World, two: list[Any]):
    (name, _), *others = world.policy.trainable()
    with pytest.raises(UserError, match=rf"weight {name} is torch.float32 \(2, 2\)"):
        two[0].load_weights(0, save({name: torch.zeros(2, 2), **dict(others)}))


def test_a_group_that_comes_twice_is_its_first_result():
    """A worker that was given up may still answer, after another has made its group again."""
    group = roll(levels({}))[0]["p"]
    other = dataclasses.replace(group, policy_version=9)
    batch = OpenGroups([group.prompt], seats=2)
    assert batch.take(4) == [group.prompt]
    batch.deliver(group)
    batch.deliver(other)
    assert batch.delivered(0.0) == [group]
    assert batch.all_delivered
    batch.put_back(["p"])
    assert batch.take(4) == [], "what is done is not made again"
