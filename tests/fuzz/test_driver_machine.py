"""The driver under any order of engine events, deaths of engine and process included, over a journal on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from e3rl.config import ErasureConfig, RolloutConfig
from e3rl.engine.protocol import Row
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.testing.scripted import Scripted, ScriptedEngine
from e3rl.train.journal import StepJournal
from e3rl.types import Candidate, Draw, Group, Problem, Prompt
from tests.fuzz.cases import long, tried
from tests.rollout.slow_reference import check_shape

HEADER = {"format": 1, "step": 1, "weights": "w"}


def script(draw: Draw, tokens: int) -> Scripted:
    """Entropies and endings that follow from the draw's name alone."""
    name = f"{draw.prompt_id}/{draw.sibling}/{draw.segment}/{draw.attempt}"
    mix = sum((i + 3) * ord(c) for i, c in enumerate(name))
    entropies = tuple(((mix * (t + 7)) % 29) / 10 for t in range(tokens))
    return Scripted(entropies, ended=mix % 5 == 0)


class Death(Exception):
    """The engine is gone, with everything that it held."""


class Unruly(ScriptedEngine):
    """An engine that delivers when and in what order it is told, and dies on command."""

    def __init__(self, rows: int) -> None:
        super().__init__(script, max_rows=rows, cache_rows=rows)
        self.dies_at: int | None = None
        self.shuffle = 0
        self.polls = 0
        self.delivered = 0

    def append(self, row: Row, ids: tuple[int, ...]) -> None:
        self._idle(row).ids += list(ids)

    def poll(self) -> list[tuple[Row, Candidate]]:
        self.polls += 1
        if self.dies_at is not None and self.polls >= self.dies_at:
            raise Death
        done = super().poll()
        self.delivered += len(done)
        turn = self.shuffle % max(1, len(done))
        return done[turn:] + done[:turn]


class DriverMachine(RuleBasedStateMachine):
    """Lives of one rollout: each goes on from the journal and ends by finishing, dying or being cut off on disk."""

    @initialize(
        siblings=st.integers(1, 4),
        prompts=st.integers(1, 4),
        room=st.integers(4, 9),
        budget=st.integers(0, 3),
        exhausted=st.sampled_from(("last", "least_uncertain")),
        kappa=st.sampled_from((-0.6, 0.0, 0.8)),
    )
    def begin(self, siblings: int, prompts: int, room: int, budget: int, exhausted: str, kappa: float) -> None:
        tried["driver machine"] += 1
        self.rollout = RolloutConfig(num_generations=siblings, segment_length=3, max_segments=3)
        baseline = "group" if siblings > 1 else "static"
        self.erasure = ErasureConfig(max_erasures=budget, on_exhausted=exhausted, kappa0=kappa, baseline=baseline)  # type: ignore[arg-type]
        self.prompts = [Prompt(Problem(f"p{i}", ""), (1, 2 + i)) for i in range(prompts)]
        self.room = max(room, siblings)
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "journal"
        self.expected, whole = self._life(None, 0, journaled=False)
        self.whole, self.spent, self.lost = whole.delivered, 0, 0
        self.finished: list[Group] | None = None

    def _life(self, dies_at: int | None, shuffle: int, journaled: bool = True) -> tuple[list[Group], Unruly]:
        engine = Unruly(self.room)
        engine.dies_at, engine.shuffle = dies_at, shuffle
        journal = StepJournal(self.path, HEADER, lambda _: None) if journaled else None
        settings = GroupSettings(self.rollout, self.erasure, seed=1, step=1)
        try:
            found = run_groups(engine, self.prompts, settings, memory=journal)
            return sorted(found, key=lambda g: g.prompt.problem.id), engine
        finally:
            assert engine.free_rows() == self.room, "every row is given back, however the life ended"
            if journal:
                self.spent += engine.delivered
                journal.close()

    @rule(dies_at=st.integers(1, 30), shuffle=st.integers(0, 7))
    def live_and_die(self, dies_at: int, shuffle: int) -> None:
        try:
            self.finished, _ = self._life(dies_at, shuffle)
        except Death:
            self.finished = None

    @rule(shuffle=st.integers(0, 7))
    def live_to_the_end(self, shuffle: int) -> None:
        self.finished, _ = self._life(None, shuffle)
        if not self.lost:
            assert self.spent == self.whole, "nothing is generated twice"

    @precondition(lambda self: self.path.exists())
    @rule(drop=st.integers(1, 200))
    def lose_the_end_of_the_journal(self, drop: int) -> None:
        content = self.path.read_bytes()
        self.path.write_bytes(content[: max(0, len(content) - drop)])
        self.lost += 1

    @invariant()
    def what_is_finished_is_what_an_undisturbed_rollout_makes(self) -> None:
        if getattr(self, "finished", None) is not None:
            assert self.finished == self.expected
            for group in self.finished or []:
                check_shape(group, self.rollout)

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            self.directory.cleanup()


DriverMachine.TestCase.settings = long
TestDriver = DriverMachine.TestCase
