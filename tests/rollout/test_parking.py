"""Parking between segments: without new weights nothing changes, with new ones every segment is exactly its own policy's."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e3rl.engine.recompute import RecomputeEngine
from e3rl.engine.torch.engine import TorchEngine
from e3rl.rollout.driver import Driver
from e3rl.rollout.group import GroupSettings
from e3rl.testing.scripted import ScriptedEngine
from e3rl.train.lessons import importance_weights
from e3rl.train.packing import erased_sequences, trajectory_sequence
from e3rl.types import Group, Trajectory
from tests.engine.models import EOS, tiny
from tests.rollout.test_driver_engines import ERASURE, PROMPTS, ROLLOUT, tokens_of, torch_engine
from tests.rollout.test_driver_properties import worlds
from tests.rollout.worlds import prompt

SETTINGS = GroupSettings(ROLLOUT, ERASURE, seed=1, step=1)


def finish(driver: Driver, between: Callable[[int], list] = lambda _: []) -> list[Group]:
    """Step to the end; ``between`` is called with the number of each step before it."""
    ended, steps = [], 0
    while driver.busy:
        ended += between(steps)
        ended += driver.step()
        steps += 1
    return sorted((job.result() for job in ended), key=lambda g: g.prompt.problem.id)


@settings(max_examples=60)
@given(worlds(), st.integers(0, 9), st.integers(0, 10**6))
def test_parking_at_any_time_changes_no_group(world, spare, seed):
    rng = random.Random(seed)
    expected, _ = world.run()
    engine = ScriptedEngine(
        world.script,
        cache_rows=world.rollout.num_generations + spare,
        ticks=lambda draw, tokens: rng.randint(1, 9),
        shuffle=rng,
    )
    driver = Driver(engine)
    for name in world.names:
        driver.submit(prompt(name), GroupSettings(world.rollout, world.erasure, seed=7, step=3, policy_version=5))

    def park(_: int) -> list:
        if rng.random() < 0.5:
            return []
        ended = driver.park()
        assert engine.held == 0
        return ended

    assert {g.prompt.problem.id: g for g in finish(driver, park)} == expected


@pytest.mark.parametrize("append", [True, False])
def test_parking_changes_no_number_of_a_real_engine(append: bool):
    """To the last bit where the engine can append: the prefix is run again as it was run."""
    engine = torch_engine()
    if not append:
        engine = RecomputeEngine(tiny("Qwen3"), eos_ids=EOS, cache_rows=9, max_length=64)
        engine.append = None  # type: ignore[assignment]
    driver = Driver(engine)
    for p in PROMPTS:
        driver.submit(p, SETTINGS)
    undisturbed = Driver(torch_engine())
    for p in PROMPTS:
        undisturbed.submit(p, SETTINGS)
    expected = finish(undisturbed)
    found = finish(driver, lambda n: driver.park() if n % 2 else [])
    assert tokens_of(found) == tokens_of(expected)
    assert found == expected or not append


def logprobs_under(model: torch.nn.Module, before: list[int], ids: list[int]) -> list[float]:
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1]
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


def test_each_segment_is_drawn_by_the_policy_that_it_names():
    """Against a naive reference of two policies: the log-probabilities of every candidate are those of a full forward pass
    of its own version over its whole prefix, so the importance ratio of a segment is the product of two such passes'."""
    policies = [copy.deepcopy(tiny("Qwen3")) for _ in range(3)]
    torch.manual_seed(3)
    for model in policies[1:]:
        for weight in model.parameters():
            weight.data += 0.05 * torch.randn_like(weight)
    served = copy.deepcopy(policies[0])
    driver = Driver(TorchEngine(served, eos_ids=EOS, max_rows=9, cache_rows=9, max_length=64))
    for p in PROMPTS:
        driver.submit(p, SETTINGS)

    def update(steps: int) -> list:
        version = {2: 1, 5: 2}.get(steps)
        return [] if version is None else driver.load_weights(policies[version].state_dict(), version)

    groups = finish(driver, update)
    trajectories = [t for g in groups for t in g.trajectories]
    assert {s.candidate.version for t in trajectories for s in t.segments} == {0, 1, 2}
    assert any(len({s.candidate.version for s in t.segments}) > 1 for t in trajectories)
    assert {e.candidate.version for t in trajectories for e in t.erasures} >= {0, 1}
    for t in trajectories:
        check_ratios(t, policies)


def check_ratios(t: Trajectory, policies: list[torch.nn.Module]) -> None:
    """Segment ratios of the newest policy, as training computes them, beside those of the naive reference."""
    prefix, expected, newest_T = list(t.prompt.ids), [], []
    for segment in t.segments:
        ids = segment.candidate.ids.tolist()
        drawn = logprobs_under(policies[segment.candidate.version or 0], prefix, ids)
        assert segment.candidate.logprobs.tolist() == pytest.approx(drawn, abs=1e-5)
        newest = logprobs_under(policies[2], prefix, ids)
        newest_T += newest
        expected += [float(torch.tensor(newest).exp().prod() / torch.tensor(drawn).exp().prod())] * len(ids)
        prefix += ids
    found = importance_weights(torch.tensor(newest_T), trajectory_sequence(t, 0), "segment_truncate", 1e9)
    assert found.weights_T.tolist() == pytest.approx(expected, rel=1e-3)
    for erasure, sequence in zip(t.erasures, erased_sequences(t, 0), strict=True):
        before = [*t.prompt.ids, *t.ids.tolist()[: erasure.start]]
        drawn = logprobs_under(policies[erasure.candidate.version or 0], before, erasure.candidate.ids.tolist())
        assert sequence.rollout_logprobs_T[erasure.start :].tolist() == pytest.approx(drawn, abs=1e-5)
