# ruff: noqa: E501
"""Sentences of docs/rollout.md about turns, with a scripted engine and a scripted environment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from e3rl.config import ErasureConfig, RolloutConfig
from e3rl.engine.protocol import Row
from e3rl.environments.protocol import Reply
from e3rl.rollout import turns
from e3rl.rollout.batches import run_groups
from e3rl.rollout.columns import decode, encode
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.ipc import from_ipc, to_ipc
from e3rl.rollout.orders import Act
from e3rl.rollout.statistics import first_candidates
from e3rl.rollout.stats import summarise
from e3rl.rollout.turns import Actors, from_json
from e3rl.testing.scripted import ScriptedEngine
from e3rl.train.journal import pack_reply, unpack_reply
from e3rl.train.lessons import over_drawn, totals_of
from e3rl.train.packing import group_sequences
from e3rl.train.scoring import Scores
from e3rl.types import Draw, Group, Observed, Problem, Prompt, ToolResult, Trajectory, Verdict
from tests.rollout.worlds import MEAN_ONLY, PLAIN_GROUP, Where, levels, rollout, verdicts

ANSWER = (9001, 9002, 9003)


@dataclass
class Script:
    """What environments answer to their n-th turn, by the state that they are in; without an entry the response is over."""

    answers: dict[int, Reply | Callable[[], Reply]]
    erasures: int = 1
    threshold: float = 0.5
    deadline: float = 5.0
    going_back: Callable[[], Reply] = Reply
    opened: list[Env] = field(default_factory=list)

    def open(self, problem: Problem) -> Env:
        self.opened.append(Env(self))
        return self.opened[-1]


@dataclass
class Env:
    script: Script
    state: int = 0
    turns: list[tuple[int, ...]] = field(default_factory=list)
    undone: int = 0
    closed: bool = False

    @property
    def environment(self) -> Env:
        return self

    def act(self, ids: Sequence[int], begin: Callable[[], None]) -> Reply:
        self.turns.append(tuple(ids))
        answer = self.script.answers.get(len(self.turns) - 1, Reply(end="stop"))
        reply = answer() if callable(answer) else answer
        if reply.observation is not None:
            reply = replace(reply, observation=replace(reply.observation, state=self.state))
            self.state += 1
        return reply

    def undo(self) -> Reply:
        self.undone += 1
        self.state -= 1
        return self.script.going_back()

    def close(self) -> None:
        self.closed = True


def reply(evidence: float = 0.0, ids: tuple[int, ...] = ANSWER, **other: Any) -> Reply:
    calls = (ToolResult("f", "{}", "3"),)
    return Reply(ids, Observed(calls, 0, evidence), **{"undoable": True, **other})


ALONE = rollout(num_generations=1, max_segments=8)


def roll(
    tools: Script,
    ends: Sequence[Where],
    table: dict[Where, float] | None = None,
    erasure: ErasureConfig = MEAN_ONLY,
    config: RolloutConfig = ALONE,
    memory: Any = None,
    engine: dict[str, Any] | None = None,
) -> tuple[list[Trajectory], ScriptedEngine]:
    scripted = ScriptedEngine(levels(table or {}, ends), **(engine or {}))
    settings = GroupSettings(config, erasure, seed=7, step=3)
    prompt = Prompt(Problem("p", "p"), (1, 2, 3), tools)
    [group] = run_groups(scripted, [prompt], settings, memory=memory)
    assert scripted.free_rows() == scripted_free(engine)
    return list(group.trajectories), scripted


def scripted_free(engine: dict[str, Any] | None) -> int:
    return ScriptedEngine({}, **(engine or {})).free_rows()


def kinds(trajectory: Trajectory) -> list[str]:
    return ["seen" if s.observation else "drawn" for s in trajectory.segments]


def test_turns():
    """38. A committed ending hands the whole assistant turn to the sibling's own environment, and a turn without a call ends the response."""
    tools = Script({0: reply()})
    config = rollout(num_generations=2, max_segments=8)
    ends = [("p", s, n, 0) for s in range(2) for n in (1, 3)]
    trajectories, _ = roll(tools, ends, config=config)
    assert [kinds(t) for t in trajectories] == [["drawn", "drawn", "seen", "drawn"]] * 2
    turns = {tuple(e.turns) for e in tools.opened}
    assert len(tools.opened) == 2
    assert turns == {
        tuple(tuple(int(i) for s in part for i in s.candidate.ids) for part in (t.segments[:2], t.segments[3:]))
        for t in trajectories
    }
    assert [(t.finish, t.failure, t.turns) for t in trajectories] == [("stop", None, 2)] * 2
    assert {id(t.environment) for t in trajectories} == {id(e) for e in tools.opened}


def test_observation():
    """39. An observation is a segment of its own: in the context of what follows, not drawn, not judged, not learnt from."""
    [trajectory], engine = roll(Script({0: reply()}), [("p", 0, 0, 0), ("p", 0, 2, 0)])
    seen = trajectory.segments[1]
    assert seen.candidate.ids.tolist() == list(ANSWER)
    assert (seen.judgement, seen.candidate.ranks.tolist(), seen.candidate.entropies.tolist()) == (
        None,
        [0] * 3,
        [0] * 3,
    )
    assert trajectory.drawn_T.tolist() == [True] * 2 + [False] * 3 + [True] * 2
    assert trajectory.committed_tokens == 4
    assert len(trajectory.ids) == 7
    context = [c.tokens for c in engine.made("prefill")]
    assert context == [3, 3 + 2 + 3], "the engine goes on from prompt, turn and observation"


def test_limit():
    """40. Observations count towards the completion limit; one that leaves no room for an answer is not shown and ends it with 'length'."""
    ends = [("p", 0, 0, 0)]
    for limit, finish, lengths in ((6, "length", (2, 3, 1)), (5, "length", (2,)), (3, "length", (2,))):
        config = replace(ALONE, max_completion_length=limit)
        [trajectory], _ = roll(Script({0: reply()}), ends, config=config)
        assert (trajectory.finish, trajectory.segment_lengths) == (finish, lengths)
    [trajectory], _ = roll(Script({0: Reply(end="length")}), ends)
    assert (trajectory.finish, trajectory.segment_lengths) == ("length", (2,))


def test_level_a():
    """41. Segments are judged before the tool runs: an erased ending calls nothing."""
    tools = Script({0: reply()})
    ends = [("p", 0, 0, 0), ("p", 0, 0, 1), ("p", 0, 2, 0)]
    [trajectory], _ = roll(tools, ends, {("p", 0, 0, 0): 2.0})
    [env] = tools.opened
    assert [list(t) for t in env.turns] == [trajectory.segments[0].candidate.ids.tolist(), trajectory.ids[-2:].tolist()]
    assert verdicts(trajectory) == [(1, Verdict.COMMIT), (0, Verdict.COMMIT)]


@pytest.mark.parametrize("erasure", [PLAIN_GROUP, replace(PLAIN_GROUP, smoothing_window=2, rho=0.3)])
def test_statistics(erasure: ErasureConfig):
    """42. Barriers, thresholds and smoothing count drawn segments alone, so an observation moves no statistic."""
    config = rollout(num_generations=3, segment_length=2, max_segments=8)
    levels_ = {("p", s, n, 0): 0.3 + 0.1 * s + 0.05 * n for s in range(3) for n in range(4)}
    plain, _ = roll(Script({}), [("p", s, 3, a) for s in range(3) for a in range(3)], levels_, erasure, config)
    shifted = {("p", s, n + (n > 1), a): u for (_, s, n, a), u in levels_.items()}
    ends = [("p", s, n, a) for s in range(3) for n in (1, 4) for a in range(3)]
    turns, _ = roll(Script({0: reply()}), ends, shifted, erasure, config)
    for mine, theirs in zip(turns, plain, strict=True):
        drawn = [s.judgement for s in mine.segments if s.observation is None]
        assert drawn == [s.judgement for s in theirs.segments]


def test_waiting():
    """43. Other rows decode while an environment answers, and what a group becomes does not depend on when it does."""
    gate = threading.Event()
    quick, slow = Script({0: reply()}), Script({0: lambda: (gate.wait(5), reply())[1]})
    ends = [("p", 0, 0, 0), ("p", 0, 2, 0), ("p", 1, 5, 0)]
    config = rollout(num_generations=2, max_segments=8, erase=False)  # else the sibling would wait at the next barrier
    delivered: list[Draw] = []

    def follow(engine: ScriptedEngine) -> None:
        original = engine.poll

        def poll() -> list[tuple[Row, Any]]:
            found = original()
            delivered.extend(c.draw for c in engine.calls if c.kind == "deliver" and c.draw not in delivered)
            if any(d.sibling == 1 and d.segment == 5 for d in delivered):
                gate.set()
            return found

        engine.poll = poll

    scripted = ScriptedEngine(levels({}, ends))
    follow(scripted)
    prompt = Prompt(Problem("p", "p"), (1, 2, 3), slow)
    [group] = run_groups(scripted, [prompt], GroupSettings(config, MEAN_ONLY, seed=7, step=3))
    at_once, _ = roll(quick, ends, config=config)
    assert gate.is_set()
    for mine, theirs in zip(group.trajectories, at_once, strict=True):
        assert (mine.failure, mine.segments) == (theirs.failure, theirs.segments)
    assert list(group.trajectories) == at_once


@pytest.mark.parametrize("how", ["hangs", "dies", "says so"])
def test_failure(how: str):
    """44. A call that outlasts the deadline, or an environment that dies, ends its own trajectory without a reward; others go on."""

    def bad() -> Reply:
        if how == "hangs":
            time.sleep(1.0)
        if how == "dies":
            raise SystemExit("gone")
        return Reply(failure="it is gone")

    tools = Script({0: reply(), 1: bad}, deadline=0.2)
    ends = [("p", 0, 0, 0), ("p", 0, 2, 0), ("p", 1, 0, 0)]
    config = rollout(num_generations=2, max_segments=4)
    [failed, other], _ = roll(tools, ends, config=config)
    why = {"hangs": "took longer than 0.2 s", "dies": "raised SystemExit: gone", "says so": "it is gone"}[how]
    assert (failed.failure, failed.finish, kinds(failed)) == (why, "stop", ["drawn", "seen", "drawn"])
    assert (other.failure, other.finish) == (None, "length")


@dataclass
class Clock:
    """In place of the module `time`."""

    now: float = 100.0

    def monotonic(self) -> float:
        return self.now


@dataclass
class Calls(Env):
    """An environment whose calls take so long on a clock."""

    clock: Clock = field(default_factory=Clock)
    takes: tuple[float, ...] = ()
    made: int = 0

    def act(self, ids: Sequence[int], begin: Callable[[], None]) -> Reply:
        for seconds in self.takes:
            begin()
            self.made += 1
            self.clock.now += seconds
        return reply()


@pytest.mark.parametrize(
    ("takes", "made", "why"),
    [((0.6, 0.6, 0.6), 3, None), ((0.1, 1.5, 0.1), 2, "took longer than 1 s"), ((0.1, 1.5), 2, "took longer than 1 s")],
)
def test_deadlines(monkeypatch: pytest.MonkeyPatch, takes: tuple[float, ...], made: int, why: str | None):
    """Of sentence 44: the deadline is each call's own; a turn that was late has failed even if it ends before anyone looks."""
    tools, actors, clock = Script({}, deadline=1.0), Actors(), Clock()
    monkeypatch.setattr(turns, "time", clock)
    env, answers = Calls(tools, clock=clock, takes=takes), []
    prompt, draw = Prompt(Problem("p", "p"), (1,), tools), Draw(0, 0, "p", 0, 0, 0)
    actors.answer(object(), prompt, {0: env}, Act(0, (1,), 0, 0), draw, answers.append)
    while actors._finished.empty():
        time.sleep(0.001)
    for done, answer in actors.replies(wait=True):
        done(answer)
    assert [answer.failure for answer in answers] == [why]
    assert (env.made, actors.beat()) == (made, made)


def test_level_b():
    """45. In a judged rollout, evidence above the threshold erases the whole turn with its observation: same prefix, same state."""
    tools = Script({0: reply(), 1: reply(1.0), 2: reply()})
    ends = [("p", 0, 0, 0), ("p", 0, 3, 0), ("p", 0, 2, 3), ("p", 0, 4, 3)]
    [trajectory], engine = roll(tools, ends)
    [env] = tools.opened
    [erasure] = trajectory.erasures
    assert kinds(trajectory) == ["drawn", "seen", "drawn", "seen", "drawn"]
    assert (erasure.index, erasure.start, len(erasure.candidate.ids)) == (2, 5, 4)
    assert tuple(erasure.candidate.ids.tolist()) == env.turns[1], "both segments of the turn"
    assert erasure.observation is not None
    assert (erasure.observation.calls[0].name, erasure.observation.state, erasure.observation.evidence) == ("f", 1, 1.0)
    assert (erasure.judgement.uncertainty.total, erasure.judgement.threshold.total) == (1.0, 0.5)
    assert erasure.judgement.verdict is Verdict.ERASE
    assert (env.undone, env.state) == (1, 2)
    assert [s.observation.state for s in trajectory.segments if s.observation] == [0, 1]
    assert 9001 not in erasure.candidate.ids.tolist()
    assert [c.tokens for c in engine.made("rollback")] == [0], (
        "to the turn's own prefix, which the row was prefilled with"
    )
    assert trajectory.erased_tokens == 4


def test_retried_turn():
    """46. A turn that is drawn again has draws of its own, and is judged against the statistics that are there."""
    erasure = replace(PLAIN_GROUP, max_erasures=2)
    table = {("p", s, n, 0): 0.3 + 0.1 * s for s in range(3) for n in range(4)} | {
        ("p", 0, 0, 3): 9.0,
        ("p", 0, 0, 4): 0.2,
        ("p", 0, 1, 3): 0.2,
        ("p", 0, 3, 3): 0.2,
    }
    ends = [("p", 0, 1, 0), ("p", 0, 1, 3), ("p", 0, 3, 3), ("p", 1, 3, 0), ("p", 2, 3, 0)]
    config = rollout(num_generations=3, max_segments=8)
    alone, engine = roll(Script({0: lambda: reply()}), ends, table, erasure, config)
    tools = Script({})
    tools.answers = {0: reply()}

    class First(Script):
        """Erases the first turn of the sibling that ends first."""

        def open(self, problem: Problem) -> Env:
            env = super().open(problem)
            if len(self.opened) == 1:
                env.script = Script({0: reply(1.0), 1: reply()})
            return env

    found, engine = roll(First({}), ends, table, erasure, config)
    draws = [(c.draw.segment, c.draw.attempt) for c in engine.made("extend") if c.draw.sibling == 0]
    assert draws == [(0, 0), (1, 0), (0, 3), (0, 4), (1, 3), (3, 3)]
    thresholds = {t.segments[0].judgement.threshold.total for t in (*found[1:], *alone)}
    assert len(thresholds) == 1
    again = found[0].segments[0].judgement
    assert (again.threshold.total, again.attempt) == (thresholds.pop(), 1)
    assert [e.judgement.attempt for e in found[0].erasures] == [0, 0]


@pytest.mark.parametrize(("erasures", "undoable", "erased"), [(1, True, 1), (2, True, 2), (0, True, 0), (2, False, 0)])
def test_budget(erasures: int, undoable: bool, erased: int):
    """47. With the turn's erasures spent, or an environment that can't go back, the observation stays and is marked as forced."""
    bad = reply(0.7, undoable=undoable)
    tools = Script(dict.fromkeys(range(erased + 1), bad), erasures=erasures)
    ends = [("p", 0, 0, 3 * n) for n in range(erased + 1)] + [("p", 0, 2, 3 * erased)]
    [trajectory], _ = roll(tools, ends)
    assert len(trajectory.erasures) == erased
    seen = trajectory.segments[1].observation
    assert (seen.forced, seen.evidence, tools.opened[0].undone) == (True, 0.7, erased)


@pytest.mark.parametrize("how", ["hangs", "raises", "says so"])
def test_going_back(how: str):
    """51. A turn is drawn again once its environment is back; one that can't, or takes too long, ends without a reward."""

    def bad() -> Reply:
        if how == "hangs":
            time.sleep(1.0)
        if how == "raises":
            raise OSError("no way")
        return Reply(failure="could not go back")

    ends = [("p", 0, 0, 0), ("p", 0, 2, 0), ("p", 0, 0, 3), ("p", 0, 2, 3), ("p", 1, 0, 0)]
    config = rollout(num_generations=2, max_segments=4)
    tools = Script({0: reply(1.0)}, going_back=bad, deadline=0.2)
    began = time.monotonic()
    trajectories, engine = roll(tools, ends, config=config)
    assert time.monotonic() - began < 0.9
    why = {"hangs": "took longer than 0.2 s", "raises": "raised OSError: no way", "says so": "could not go back"}[how]
    assert [t.failure for t in trajectories] == [why] * 2
    assert [(t.finish, kinds(t), t.erasures) for t in trajectories] == [("stop", ["drawn"], ())] * 2
    assert {c.draw.attempt for c in engine.made("extend")} == {0}, "nothing is drawn behind a state that is not there"


def test_plain():
    """48. A plain rollout erases no turn."""
    tools = Script({0: reply(1.0)})
    [trajectory], _ = roll(tools, [("p", 0, 0, 0), ("p", 0, 2, 0)], config=replace(ALONE, erase=False))
    assert (trajectory.erasures, tools.opened[0].undone, trajectory.segments[1].observation.forced) == ((), 0, False)


@dataclass
class Memory:
    """Everything of an earlier process, up to a number of records."""

    candidates: dict[Draw, Any] = field(default_factory=dict)
    replies: dict[Draw, Reply] = field(default_factory=dict)

    def take(self, draw: Draw) -> Any:
        return self.candidates.pop(draw, None)

    def add(self, draw: Draw, candidate: Any) -> None:
        self.candidates[draw] = candidate

    def take_reply(self, draw: Draw) -> Reply | None:
        return self.replies.pop(draw, None)

    def add_reply(self, draw: Draw, found: Reply) -> None:
        self.replies[draw] = found

    def flush(self) -> None: ...


@pytest.mark.parametrize("kept", range(7))
def test_memory(kept: int):
    """49. What an environment answered is remembered like a candidate: the tools run again for their state, the memory's answer counts."""
    ends = [("p", 0, 0, 0), ("p", 0, 2, 0), ("p", 0, 2, 3), ("p", 0, 4, 3)]

    def script(ids: tuple[int, ...]) -> Script:
        return Script({0: reply(ids=ids), 1: reply(1.0), 2: reply()})

    whole = Memory()
    [first], _ = roll(script(ANSWER), ends, memory=whole)
    names = sorted([*whole.candidates, *whole.replies], key=lambda d: (d.attempt, d.segment))
    assert len(names) == 8
    left = names[:kept]
    partial = Memory(
        {d: c for d, c in whole.candidates.items() if d in left}, {d: r for d, r in whole.replies.items() if d in left}
    )
    changed = (7, 7, 7) if kept >= 2 else ANSWER
    tools = script(changed)
    [again], engine = roll(tools, ends, memory=partial)
    assert again == first, "a tool that answers otherwise now changes nothing that was known"
    assert (tools.opened[0].state, tools.opened[0].undone, len(tools.opened[0].turns)) == (2, 1, 4)
    assert len(engine.made("extend")) == len([d for d in whole.candidates if d not in left])


def test_contexts():
    """50. Every erasure can be put behind the tokens that it was drawn after, those of a turn that was erased later among them."""
    tools = Script({0: reply(), 1: reply(1.0), 2: reply()})
    ends = [("p", 0, 0, 0), ("p", 0, 3, 1), ("p", 0, 2, 4), ("p", 0, 4, 3)]
    [trajectory], _ = roll(tools, ends, {("p", 0, 3, 0): 2.0, ("p", 0, 2, 3): 2.0})
    [env] = tools.opened
    inner, turn, outer = trajectory.erasures
    start = trajectory.ids[:5].tolist()
    assert (inner.observation, outer.observation, turn.observation is None) == (None, None, False)
    assert trajectory.context_of(0) == start + list(env.turns[1][:2])
    assert trajectory.context_of(1) == trajectory.context_of(2) == start


def test_turns_survive_every_encoding():
    """Columns and journal give back what they were given, observations and erased turns among it."""
    tools = Script({0: reply(), 1: reply(1.0), 2: reply()})
    memory = Memory()
    [trajectory], _ = roll(tools, [("p", 0, 0, 0), ("p", 0, 3, 0), ("p", 0, 2, 3), ("p", 0, 4, 3)], memory=memory)
    group = Group(trajectory.prompt, (trajectory,), 4)
    [found] = decode(from_ipc(to_ipc([encode([group])]))[0], lambda *_: trajectory.prompt)
    assert found.group == group
    for draw, kept in memory.replies.items():
        assert unpack_reply(pack_reply(draw, kept)) == (draw, kept)


@pytest.mark.parametrize(
    "text",
    [
        '{"calls": [{"name": "f"}], "state": 0}',
        '{"calls": [{"name": "f", "arguments": "", "result": 5}], "state": 0}',
        '{"calls": [], "state": "0"}',
        '{"calls": [], "state": 0, "evidence": NaN}',
        '{"calls": [], "state": 0, "forced": 1}',
        "[" * 100_000,
        "[]",
    ],
    ids=["a part", "a number for a text", "a text for a number", "no number", "no truth", "deep", "a list"],
)
def test_what_is_no_observation_is_refused(text: str):
    with pytest.raises(ValueError, match="observation that is none"):
        from_json(text)


def test_what_is_learnt_from_turns():
    """Observations are context and no lesson; an erased candidate stands behind what it was drawn after."""
    tools = Script({0: reply(), 1: reply(1.0), 2: reply()})
    ends = [("p", 0, 0, 0), ("p", 0, 3, 1), ("p", 0, 2, 3), ("p", 0, 4, 3)]
    [trajectory], _ = roll(tools, ends, {("p", 0, 3, 0): 2.0})
    whole, inner, turn = group_sequences([Group(trajectory.prompt, (trajectory,), 4)], with_erased=True)
    assert whole.segments_T.tolist() == [0, 0, -1, -1, -1, 1, 1, -1, -1, -1, 2, 2]
    assert whole.mask_T.tolist() == trajectory.drawn_T.tolist()
    assert list(inner.response_ids) == trajectory.context_of(0) + trajectory.erasures[0].candidate.ids.tolist()
    assert inner.mask_T.tolist() == [False] * 7 + [True] * 2
    assert turn.segments_T.tolist() == [-1] * 5 + [1] * 4
    assert totals_of([whole, inner, turn], 100).tokens == 6
    shares = torch.full((12,), 1 / 12)
    _, scores, _ = over_drawn((whole, Scores(shares, shares, shares), None))
    assert scores.shares_T.tolist() == pytest.approx([1 / 6 if drawn else 0 for drawn in whole.mask_T])
    assert [s.index for s in first_candidates(trajectory)] == [0, 1, 2, 2]
    stats = summarise([Group(trajectory.prompt, (trajectory,), 4)])
    assert (stats.committed_tokens, stats.erased_tokens, stats.generated_tokens) == (6, 6, 12)
