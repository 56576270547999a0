"""Parked siblings on vLLM's real scheduler, without a model: contracts of what the subclass relies on, and random schedules."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from tests.vllm.schedules import Schedule, World, alone

SCHEDULES = int(os.environ.get("E3RL_SCHEDULES", "300"))


@pytest.fixture(scope="module")
def model_path(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's config: the scheduler asks it for lengths."""
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


ROOMY = World(
    seed=1,
    asynchronous=False,
    blocks=200,
    rows=8,
    budget=64,
    groups=2,
    siblings=3,
    segments=4,
    length=6,
    prompt=9,
    erase=0.5,
    end=0.0,
    cancel=0.0,
)


def _check_end(played: Schedule) -> None:
    """Nothing is held any more."""
    pool = played.scheduler.kv_cache_manager.block_pool
    assert len(played.scheduler.parking) == 0
    assert pool.get_num_free_blocks() == played.world.blocks - 1
    assert not played.scheduler.requests
    assert not played.stale_names()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("length", [6, 4, 3])
def test_one_token_runs_again_after_a_commit_and_after_an_erasure(model_path: Path, asynchronous: bool, length: int):
    played = Schedule(replace(ROOMY, asynchronous=asynchronous, length=length), model_path)
    played.play()
    assert len(played.commits) == 18
    assert len(played.erasures) > 8
    assert set(played.commits) == set(played.erasures) == {1}
    _check_end(played)


def test_without_room_to_park_prefixes_come_from_the_cache_or_are_run_again(model_path: Path):
    world = replace(ROOMY, blocks=1 + 9, rows=3)
    tight, roomy = Schedule(world, model_path), Schedule(ROOMY, model_path)
    assert tight.play() == roomy.play()
    assert max(tight.commits + tight.erasures) > 1
    _check_end(tight)


class Silent(Schedule):
    """Nobody asks for the second segment of the first group's siblings, and nobody lets go of them."""

    def _pass_barrier(self, number: int) -> None:
        if number:
            super()._pass_barrier(number)
        for sibling in self.groups[0]:
            sibling.done |= sibling.waiting


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_stays_parked_for_ever_holds_up_nobody(model_path: Path, asynchronous: bool):
    """The others need all blocks of a cache that those hold a part of, and get them."""
    world = replace(ROOMY, blocks=1 + 13, rows=3, asynchronous=asynchronous)
    played = Silent(world, model_path)
    drawn, parking, held = played.play(), played.scheduler.parking, [s.parked for s in played.groups[0]]
    assert all(drawn[s.name] == alone(world, s.name) for s in played.groups[1])
    assert all(held)
    assert not any(s.segment > 1 for s in played.groups[0])
    assert len(parking) < len(held), "some gave their blocks back"
    played.scheduler.finish_requests(held, RequestStatus.FINISHED_ABORTED)
    _check_end(played)


def test_a_block_that_is_written_to_loses_its_name(model_path: Path):
    """A segment is erased whose block was full: the block's hash says what is no longer in it."""
    world = replace(ROOMY, groups=1, siblings=1, segments=1, length=8, prompt=6, erase=1.0)
    played = Schedule(world, model_path)
    assert len(played.play()["0.0"]) == 4
    assert played.erasures == [1, 1, 1]
    _check_end(played)


def test_retries_come_before_other_requests(model_path: Path):
    played = Schedule(replace(ROOMY, rows=1, budget=8, groups=1, siblings=2, erase=0.0), model_path)
    first, second = played.groups[0]
    played._extend(0, first)
    second.attempt = 1
    played._extend(0, second)
    assert list(played.scheduler.schedule().num_scheduled_tokens) == [second.open]


def test_random_schedules_end_and_draw_what_a_lonely_row_would(model_path: Path):
    """Any number of blocks from one row's upwards, with everything parked, both ways of scheduling: no deadlock, no block
    with other tokens in it than its reader thinks, nothing left behind."""
    totals = dict.fromkeys(("requests", "steps", "preempted", "again"), 0)
    for seed in range(SCHEDULES):
        world = World.random(seed)
        played = Schedule(world, model_path)
        drawn = played.play()
        _check_end(played)
        for group in played.groups:
            for sibling in group:
                expected = alone(world, sibling.name)
                assert drawn[sibling.name] == expected[: len(drawn[sibling.name])]
                assert len(drawn[sibling.name]) == len(expected) or world.cancel
        totals["requests"] += played.count
        totals["steps"] += played.steps
        totals["preempted"] += played.preempted
        totals["again"] += sum(played.commits + played.erasures)
    print(f"\n{SCHEDULES} schedules: {totals}")
    assert totals["preempted"] > SCHEDULES / 20
