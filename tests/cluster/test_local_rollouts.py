"""Rollouts in a thread: new weights come between two segments of what is under way, and the engine can be borrowed."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from e3rl.cluster.rollouts import LocalRollouts
from e3rl.config import load_config
from e3rl.engine.torch.engine import TorchEngine
from e3rl.errors import UserError
from e3rl.rollout.group import GroupSettings
from e3rl.types import Group
from tests.engine.models import EOS, tiny
from tests.rollout.test_driver_engines import ERASURE, PROMPTS, ROLLOUT, tokens_of, torch_engine

SETTINGS = GroupSettings(ROLLOUT, ERASURE, seed=1, step=1)


class Patient(TorchEngine):
    """Its third poll waits until somebody wants to visit."""

    rollouts: LocalRollouts
    polls = 0

    def __init__(self, *args, **settings) -> None:
        super().__init__(*args, **settings)
        self.decoding = threading.Event()

    def poll(self):
        self.polls += 1
        if self.polls == 3:
            self.decoding.set()
            with self.rollouts._turns._changed:
                assert self.rollouts._turns._changed.wait_for(lambda: self.rollouts._turns.visitors, 60)
        return super().poll()


def rolled_out_beside(visit) -> tuple[list[Group], Patient]:
    """The groups that a thread makes while this one visits once."""
    model = copy.deepcopy(tiny("Qwen3"))
    engine = Patient(model, eos_ids=EOS, max_rows=9, cache_rows=9, max_length=64)
    engine.rollouts = rollouts = LocalRollouts(engine, None)
    groups: list[Group] = []
    thread = threading.Thread(target=lambda: groups.extend(rollouts.run(PROMPTS, SETTINGS, lambda: None)))
    thread.start()
    assert engine.decoding.wait(60)
    with rollouts.paused():
        assert engine.free_rows() == 9
        visit(rollouts, model)
    thread.join(60)
    assert engine.free_rows() == 9
    return sorted(groups, key=lambda g: g.prompt.problem.id), engine


def test_who_visits_without_a_change_changes_nothing():
    undisturbed = sorted(
        LocalRollouts(torch_engine(), None).run(PROMPTS, SETTINGS, lambda: None), key=lambda g: g.prompt.problem.id
    )
    found, _ = rolled_out_beside(lambda *_: None)
    assert tokens_of(found) == tokens_of(undisturbed)
    assert found == undisturbed


def test_new_weights_draw_the_segments_after_them():
    def update(rollouts: LocalRollouts, model: torch.nn.Module) -> None:
        torch.manual_seed(1)
        for weight in model.parameters():
            weight.data += 0.05 * torch.randn_like(weight)
        rollouts.load_weights(1, {})

    found, _ = rolled_out_beside(update)
    versions = [[s.candidate.version for s in t.segments] for g in found for t in g.trajectories]
    assert all(v == sorted(v) for v in versions)
    assert {0, 1} == {v for found in versions for v in found}
    assert any(len(set(v)) == 2 for v in versions)
    assert {g.policy_version for g in found} == {0}


def test_two_who_visit_and_one_who_stays_take_turns():
    rollouts = LocalRollouts(torch_engine(), None)
    inside, most = [0], [0]

    def visit() -> None:
        for _ in range(20):
            with rollouts.paused():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=visit) for _ in range(2)]
    for thread in threads:
        thread.start()
    groups = list(rollouts.run(PROMPTS, SETTINGS, lambda: None))
    for thread in threads:
        thread.join(60)
    assert most == [1]
    assert len(groups) == len(PROMPTS)


class Resting(TorchEngine):
    """Notes how many rows were free whenever it was sent to rest."""

    def __init__(self, *args, **settings) -> None:
        super().__init__(*args, **settings)
        self.free: list[int] = []

    def rest(self) -> None:
        self.free.append(self.free_rows())


def test_an_engine_rests_once_all_groups_are_there():
    engine = Resting(tiny("Qwen3"), eos_ids=EOS, max_rows=9, cache_rows=9, max_length=64)
    rollouts = LocalRollouts(engine, None)
    running = rollouts.run(PROMPTS, SETTINGS, lambda: None)
    next(running)
    assert engine.free == []
    assert len(list(running)) == len(PROMPTS) - 1
    assert engine.free == [9]


@pytest.mark.parametrize("other", ["rollout.engine=torch", "rollout.servers=['http://a:1']", "rollout.workers=2"])
def test_an_engine_that_training_does_not_wait_for_may_not_sleep(other: str):
    given = ["data.train=lab:arith:1", "rollout.engine=vllm", "rollout.vllm_sleep=true"]
    assert load_config(None, (), given).rollout.vllm_sleep
    with pytest.raises(UserError, match="vllm_sleep = true needs"):
        load_config(None, (), [*given, other])
    with pytest.raises(UserError, match="vllm_sleep = true needs"):
        load_config(None, (), [*given, "rollout.staleness=1", "train.importance_correction=segment_mask"])
