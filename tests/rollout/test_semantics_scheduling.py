"""Sentences of docs/rollout.md about scheduling, and the record that is left."""

from __future__ import annotations

from dataclasses import replace

import pytest

from e3rl.config import ErasureConfig
from e3rl.errors import UserError
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.moments import Distribution, Moments
from e3rl.rollout.orders import Committed, Erased, Finished
from e3rl.testing.scripted import ScriptedEngine
from e3rl.types import Draw
from tests.rollout.slow_reference import check_numbers
from tests.rollout.worlds import MEAN_ONLY, PLAIN_GROUP, calibration_of, levels, only, prompt, roll, rollout


def ticks_of(engine: ScriptedEngine, kind: str, sibling: int, segment: int, attempt: int = 0, prompt: str = "p") -> int:
    """When a call was made for the candidate."""
    draw = Draw(7, 3, prompt, sibling, segment, attempt)
    (call,) = [c for c in engine.made(kind) if c.draw == draw]
    return call.tick


def slow(prompt_id: str, sibling: int, extra: int):
    """Every candidate of one sibling takes longer."""
    return lambda draw, tokens: tokens + extra * ((draw.prompt_id, draw.sibling) == (prompt_id, sibling))


def test_barrier():
    """25. A first candidate is judged when every sibling has finished or delivered its own, and not before."""
    seen: list[tuple[int, int]] = []
    engine_settings = {"ticks": slow("p", 1, 5)}
    _, engine = roll(
        levels({}), engine=engine_settings, observe=lambda e: isinstance(e, Committed) and seen.append((e.sibling, 0))
    )
    assert ticks_of(engine, "deliver", 0, 0) == 2
    assert ticks_of(engine, "deliver", 1, 0) == 7
    assert ticks_of(engine, "extend", 0, 1) == 7
    assert ticks_of(engine, "extend", 0, 2) == 14
    assert len(seen) == 6


def test_accepted_sibling_goes_on():
    """26. An accepted sibling goes on while another regenerates, and waits for it only at the next barrier."""
    _, engine = roll(levels({("p", 1, 0, 0): 2.0, ("p", 1, 0, 1): 2.0}))
    assert [ticks_of(engine, "extend", 1, 0, e) for e in range(3)] == [0, 2, 4]
    assert ticks_of(engine, "extend", 0, 1) == 2
    assert ticks_of(engine, "deliver", 0, 1) == 4
    assert ticks_of(engine, "deliver", 1, 1) == 8
    assert ticks_of(engine, "extend", 0, 2) == ticks_of(engine, "extend", 1, 2) == 8
    assert engine.clock == 10


def test_finishing_opens_barriers():
    """27. A sibling that finishes opens the barriers that waited for it."""
    table = {("p", 1, 0, 0): 2.0, ("p", 1, 0, 1): 2.0}
    _, engine = roll(levels(table, ends=[("p", 1, 0, 2)]))
    assert ticks_of(engine, "deliver", 0, 1) == 4
    assert ticks_of(engine, "deliver", 1, 0, 2) == 6
    assert ticks_of(engine, "extend", 0, 2) == 6


@pytest.mark.parametrize("source", ["reference", "static"])
def test_no_barrier(source):
    """28. Where no statistic comes from the siblings there is no barrier."""
    config = replace(MEAN_ONLY, baseline=source, entropy_reference="batch")
    outside = {
        "calibration": calibration_of(rollout(), config, Distribution.of([1.0])),
        "entropy_moments": Moments.of([0.5, 1.0]),
    }
    _, engine = roll(levels({}), config, engine={"ticks": slow("p", 1, 50)}, **outside)
    assert [ticks_of(engine, "extend", 0, n) for n in range(3)] == [0, 2, 4]
    assert ticks_of(engine, "deliver", 1, 0) == 52


def test_other_groups_fill_the_batch():
    """29. Other groups fill the batch while a group waits."""
    table = {("p", 1, 0, 0): 2.0, ("p", 1, 0, 1): 2.0}
    _, engine = roll(levels(table), prompts=["p", "q"], engine={"max_rows": 2, "cache_rows": 4})
    tokens = sum(c.tokens for c in engine.made("deliver"))
    assert tokens == 28
    assert engine.batch_sizes == [2] * 14


def test_rows_are_reused():
    """30. A finished row is released at once, and a new group is admitted as soon as all of its rows fit."""
    ends = [("p", 0, 0, 0), ("q", 1, 1, 0)]
    _, engine = roll(levels({}, ends=ends), prompts=["p", "q", "r"], engine={"cache_rows": 5})
    released = {c.row: c.tick for c in engine.made("release")}
    admitted = [c.tick for c in engine.made("prefill")]
    assert (released[0], released[3]) == (2, 4)
    assert admitted == [0, 0, 0, 0, 2, 2]  # a fifth row was free; r needs two
    assert max(c.row for c in engine.made("prefill")) == 5


def test_group_too_large():
    """31. A group that can never fit is an error that names both numbers."""
    with pytest.raises(UserError, match=r"needs 4 rows .*the engine has 3"):
        roll(levels({}), config=rollout(num_generations=4), engine={"cache_rows": 3})
    groups, engine = roll(levels({}), config=rollout(num_generations=4), prompts=[], engine={"cache_rows": 3})
    assert (groups, engine.calls) == ({}, [])


def test_same_problem_twice():
    """32. A problem that occurs twice in a batch is an error, since both groups would get the same draws."""
    with pytest.raises(UserError, match=r"problem id 'p' occurs twice"):
        roll(levels({}), prompts=["p", "q", "p"])


def test_plain():
    """33. A plain rollout judges nothing, erases nothing and waits for nothing."""
    groups, engine = roll(
        levels({}, ends=[("p", 0, 1, 0)], default=99.0),
        PLAIN_GROUP,
        replace(rollout(), erase=False),
        engine={"ticks": slow("p", 1, 50)},
    )
    trajectory = only(groups)
    assert [s.judgement for s in trajectory.segments] == [None, None]
    assert (trajectory.erasures, trajectory.finish) == ((), "stop")
    assert ticks_of(engine, "extend", 0, 1) == 2
    assert engine.made("rollback") == []
    assert groups["p"].policy_version == 5


def test_independence():
    """34. What a group becomes does not depend on batching, on the order of completion or on other groups."""
    script = levels({("p", 1, 0, 0): 2.0, ("q", 0, 1, 0): 0.9, ("p", 0, 2, 0): 0.8}, ends=[("q", 1, 1, 0)])
    together, _ = roll(script, PLAIN_GROUP, prompts=["p", "q", "r"])
    narrow, _ = roll(script, PLAIN_GROUP, prompts=["r", "q", "p"], engine={"max_rows": 1, "cache_rows": 2})
    alone, _ = roll(script, PLAIN_GROUP, prompts=["p"], engine={"ticks": slow("p", 0, 3)})
    assert together == narrow
    assert alone["p"] == together["p"]


class Failing(ScriptedEngine):
    """Breaks down at a given poll."""

    polls = 0

    def poll(self):
        self.polls += 1
        if self.polls == 3:
            raise OSError("the machine is gone")
        return super().poll()


def test_rows_are_released():
    """35. Every row is released when the rollout ends, is closed early, or is stopped by an error."""
    script, prompts = levels({}, ends=[("p", 0, 0, 0), ("p", 1, 0, 0)]), [prompt(p) for p in "pqr"]
    whole, closed, broken = ScriptedEngine(script), ScriptedEngine(script), Failing(script)
    settings = GroupSettings(rollout(), MEAN_ONLY, seed=0)
    list(run_groups(whole, prompts, settings))
    groups = run_groups(closed, prompts, settings)
    assert next(groups).prompt.problem.id == "p"
    assert closed.held == 4
    groups.close()
    with pytest.raises(OSError, match="the machine is gone"):
        list(run_groups(broken, prompts, settings))
    assert (whole.held, closed.held, broken.held) == (0, 0, 0)


def test_events():
    """36. What happens is told as it happens: each commit, each erasure, each finished group."""
    events: list[Committed | Erased | Finished] = []
    groups, _ = roll(levels({("p", 0, 1, 0): 2.0}), observe=events.append)
    told = [type(e).__name__ for e in events if isinstance(e, Finished) or e.sibling == 0]
    assert told == ["Committed", "Erased", "Committed", "Committed", "Finished"]
    assert [e.erasure for e in events if isinstance(e, Erased)] == list(only(groups).erasures)
    assert events[-1] == Finished(groups["p"])
    assert {e.prompt_id for e in events[:-1]} == {"p"}


def test_complete_record():
    """37. The record is complete: U, its terms, Theta and its factors can all be recomputed from it."""
    config = ErasureConfig(
        perturbation_weight=0.7, length_exponent=0.5, kappa0=0.2, kappa1=0.3, eta=0.02, first_modulation=0.9
    )
    table = {
        ("p", i, n, e): (0.3 * i + 0.2 * n, 0.9 - 0.4 * e * n) for i in range(4) for n in range(3) for e in range(6)
    }
    groups, _ = roll(levels(table, ends=[("p", 2, 1, 0)]), config, rollout(num_generations=4))
    erased = sum(len(t.erasures) for t in groups["p"].trajectories)
    assert erased > 0
    assert check_numbers(groups["p"], config) == erased + 11
