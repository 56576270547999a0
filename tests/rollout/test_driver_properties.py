"""What holds of every rollout, whatever the script, the settings and the engine's order of work."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e3rl.config import ErasureConfig, RolloutConfig
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.stats import summarise
from e3rl.testing.scripted import Scripted, ScriptedEngine
from e3rl.types import Draw, Group
from tests.rollout.slow_reference import check_decisions, check_numbers, check_shape
from tests.rollout.worlds import prompt, roll


@dataclass(frozen=True)
class World:
    """Random settings, and a script that is a pure function of the draw."""

    salt: int
    end_rate: float
    prompts: int
    rollout: RolloutConfig
    erasure: ErasureConfig

    def script(self, draw: Draw, tokens: int) -> Scripted:
        rng = random.Random(f"{self.salt}{draw}")
        length = rng.randint(1, tokens)
        ended = rng.random() < self.end_rate
        count = length if ended else tokens
        entropies = tuple(rng.expovariate(1.0) for _ in range(count))
        return Scripted(entropies, tuple(rng.expovariate(2.0) for _ in range(count)), ended)

    @property
    def names(self) -> list[str]:
        return [f"p{i}" for i in range(self.prompts)]

    def run(self, prompts: list[str] | None = None, **engine: Any) -> tuple[dict[str, Group], ScriptedEngine]:
        names = self.names if prompts is None else prompts
        return roll(self.script, self.erasure, self.rollout, names, engine=engine)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    siblings = draw(st.integers(1, 4))
    rollout = RolloutConfig(
        num_generations=siblings,
        segment_length=draw(st.integers(1, 4)),
        max_segments=draw(st.integers(1, 4)),
        max_completion_length=draw(st.sampled_from([0, 0, 1, 5])),
    )
    erasure = ErasureConfig(
        max_erasures=draw(st.integers(0, 3)),
        base_weight=draw(st.sampled_from([0.0, 1.0])),
        gradient_weight=draw(st.sampled_from([0.0, 0.5])),
        extremum_weight=draw(st.sampled_from([0.1, 1.0])),
        perturbation_weight=draw(st.sampled_from([0.0, 1.0])),
        length_exponent=draw(st.sampled_from([0.0, 0.5])),
        smoothing_window=draw(st.integers(0, 2)),
        baseline="static" if siblings == 1 else draw(st.sampled_from(["static", "group", "quantile"])),
        quantile=draw(st.sampled_from([0.0, 0.3, 1.0])),
        static_baseline=draw(st.sampled_from([0.5, 1.5])),
        min_siblings=draw(st.integers(2, max(2, siblings))),
        kappa0=draw(st.sampled_from([-0.3, 0.0, 0.5])),
        kappa1=draw(st.sampled_from([0.0, 0.3])),
        eta=draw(st.sampled_from([0.0, 0.05])),
        rho=draw(st.sampled_from([0.0, 0.4])),
        on_exhausted=draw(st.sampled_from(["last", "least_uncertain"])),
    )
    return World(
        draw(st.integers(0, 10**6)), draw(st.sampled_from([0.0, 0.3])), draw(st.integers(1, 4)), rollout, erasure
    )


@settings(max_examples=60)
@given(worlds())
def test_every_record_can_be_recomputed(world):
    groups, _ = world.run()
    for group in groups.values():
        check_shape(group, world.rollout)
        check_decisions(group, world.erasure)
        check_numbers(group, world.erasure)


@settings(max_examples=60)
@given(worlds())
def test_no_token_is_lost_or_counted_twice(world):
    groups, engine = world.run()
    stats = summarise(groups.values())
    delivered = sum(c.tokens for c in engine.made("deliver"))
    assert stats.generated_tokens == delivered
    assert len({c.draw for c in engine.made("extend")}) == stats.candidates
    assert list(groups) == [] or set(groups) == set(world.names)
    assert engine.held == 0
    assert len(engine.made("release")) == len(engine.made("prefill")) == world.prompts * world.rollout.num_generations


@settings(max_examples=60)
@given(worlds(), st.integers(1, 9), st.integers(0, 9), st.integers(0, 10**6))
def test_groups_do_not_depend_on_the_engines_order(world, max_rows, spare, seed):
    rng = random.Random(seed)
    expected, _ = world.run()
    names = rng.sample(world.names, k=rng.randint(1, world.prompts))
    groups, _ = world.run(
        names,
        max_rows=max_rows,
        cache_rows=world.rollout.num_generations + spare,
        ticks=lambda draw, tokens: rng.randint(1, 9),
        shuffle=rng,
    )
    assert groups == {name: expected[name] for name in names}


class Fragile(ScriptedEngine):
    """Fails at a given call of `poll` or `extend`."""

    def __init__(self, *args: Any, fail_at: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.countdown = fail_at

    def _fail_in_time(self) -> None:
        self.countdown -= 1
        if self.countdown == 0:
            raise OSError("lost")

    def poll(self):
        self._fail_in_time()
        return super().poll()

    def extend(self, *args):
        self._fail_in_time()
        super().extend(*args)


@settings(max_examples=40)
@given(worlds(), st.integers(1, 40), st.integers(0, 3))
def test_rows_are_released_whatever_happens(world, fail_at, taken):
    engine = Fragile(world.script, fail_at=fail_at, cache_rows=world.rollout.num_generations * 2)
    settings = GroupSettings(world.rollout, world.erasure, seed=7, step=3, policy_version=5)
    groups = run_groups(engine, [prompt(n) for n in world.names], settings)
    try:
        for _, _ in zip(range(taken), groups, strict=False):
            assert engine.held <= world.rollout.num_generations * 2
    except OSError:
        assert engine.countdown <= 0
    groups.close()
    assert engine.held == 0


def test_an_engine_that_stalls_is_an_error():
    class Stalled(ScriptedEngine):
        def poll(self):
            return []

    engine = Stalled(lambda draw, tokens: Scripted((1.0,) * tokens))
    settings = GroupSettings(RolloutConfig(num_generations=3), ErasureConfig(), seed=0)
    with pytest.raises(RuntimeError, match="completed nothing while 3 rows wait"):
        list(run_groups(engine, [prompt()], settings))
    assert engine.held == 0


@pytest.mark.parametrize("got", [3, 5])
def test_an_engine_that_returns_another_length_is_an_error(got):
    class Wrong(ScriptedEngine):
        def extend(self, row, tokens, draw, sampling):
            super().extend(row, got, draw, sampling)

    engine = Wrong(lambda draw, tokens: Scripted((1.0,) * tokens))
    config = RolloutConfig(num_generations=2, segment_length=4)
    with pytest.raises(RuntimeError, match=rf"asked for 4 .* returned {got} \(prompt 'p', sibling 0, segment 0"):
        list(run_groups(engine, [prompt()], GroupSettings(config, ErasureConfig(), seed=0)))


def test_prompts_are_taken_only_when_their_rows_are_free():
    taken: list[str] = []

    def stream():
        for name in "pqr":
            taken.append(name)
            yield prompt(name)

    engine = ScriptedEngine(lambda draw, tokens: Scripted((1.0,) * tokens), cache_rows=2)
    config = RolloutConfig(num_generations=2, segment_length=2, max_segments=1)
    groups = run_groups(engine, stream(), GroupSettings(config, ErasureConfig(), seed=0))
    assert taken == []
    next(groups)
    assert taken == ["p", "q"]
    groups.close()
