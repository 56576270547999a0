"""An engine that has a memory: what it was asked before, in this process or in one that died, it answers at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from torch import Tensor

from e3rl.engine.protocol import Engine, Row, Sampling
from e3rl.train.journal import StepJournal
from e3rl.types import Candidate, Draw


@dataclass(slots=True, eq=False)
class _Row:
    """A row as the scheduler sees it. ``inner`` is the engine's own, made when something must be generated."""

    group: _Group
    ids: list[int] = field(default_factory=list)
    draw: Draw | None = None
    inner: Row | None = None
    offset: int = 0  # generated tokens that the engine holds as part of the row's prompt


@dataclass(slots=True, eq=False)
class _Group:
    prompt_ids: Sequence[int]
    rows: list[_Row] = field(default_factory=list)


class JournaledEngine:
    """Implements `e3rl.engine.protocol.Engine` over another engine and a step's journal.

    Rows whose candidates are all known never reach the engine. One that has to go on from known tokens is taken up by
    the engine's ``append`` where it has one: then, on a CPU, everything after is as if there had been no break, to the
    last bit. Any other engine gets prompt and tokens as one prompt.
    """

    def __init__(self, engine: Engine, journal_of: Callable[[int], StepJournal]) -> None:
        self._engine, self._journal_of = engine, journal_of
        self._append = getattr(engine, "append", None)
        self._rows: dict[Row, _Row] = {}
        self._outer: dict[Row, Row] = {}  # rows by the engine's own name for them
        self._answers: list[tuple[Row, Candidate]] = []
        self._handles = count()
        self._waiting = 0  # rows that the engine does not hold yet
        self.replayed = 0
        """Candidates that were answered from the journal."""

    def free_rows(self) -> int:
        return self._engine.free_rows() - self._waiting

    def prefill(self, prompt_ids: Sequence[int], siblings: int) -> list[Row]:
        """Make rows; the engine runs the prompt when the first of them asks for something new."""
        group = _Group(prompt_ids)
        group.rows += [_Row(group) for _ in range(siblings)]
        self._waiting += siblings
        handles = [Row(next(self._handles)) for _ in group.rows]
        self._rows.update(zip(handles, group.rows, strict=True))
        return handles

    def length(self, row: Row) -> int:
        return len(self._rows[row].ids)

    def extend(self, row: Row, tokens: int, draw: Draw, sampling: Sampling) -> None:
        known = self._journal_of(draw.step).take(draw)
        if known is not None:
            self._answers.append((row, known))
            return
        state = self._rows[row]
        inner = self._materialised(row, state)
        state.draw = draw
        self._engine.extend(inner, tokens, draw, sampling)

    def _materialised(self, handle: Row, state: _Row) -> Row:
        """The engine's row, made where there is none yet and brought up to the tokens that it has to go on from."""
        if state.inner is None:
            self._prefill_group(state.group)
        assert state.inner is not None
        held = self._engine.length(state.inner) + state.offset
        if held < len(state.ids) and self._append is not None:
            self._append(state.inner, state.ids[held:])
        elif held < len(state.ids):
            self._engine.release(state.inner)
            [state.inner] = self._engine.prefill([*state.group.prompt_ids, *state.ids], 1)
            state.offset = len(state.ids)
        self._outer[state.inner] = handle
        return state.inner

    def _prefill_group(self, group: _Group) -> None:
        """Rows for all siblings that are still held: their prompt goes through the model once."""
        rows = self._engine.prefill(group.prompt_ids, len(group.rows))
        self._waiting -= len(rows)
        for state, inner in zip(group.rows, rows, strict=True):
            state.inner = inner

    def poll(self) -> list[tuple[Row, Candidate]]:
        if self._answers:
            answers, self._answers = self._answers, []
            self.replayed += len(answers)
            for row, candidate in answers:
                self._rows[row].ids += candidate.ids.tolist()
            return answers
        generated = [(self._outer[inner], candidate) for inner, candidate in self._engine.poll()]
        journals = set()
        for row, candidate in generated:
            state = self._rows[row]
            assert state.draw is not None
            journal = self._journal_of(state.draw.step)
            journal.add(state.draw, candidate)
            journals.add(journal)
            state.ids += candidate.ids.tolist()
        for journal in journals:
            journal.flush()
        return generated

    def rollback(self, row: Row, length: int) -> None:
        state = self._rows[row]
        del state.ids[length:]
        if state.inner is not None and self._engine.length(state.inner) + state.offset > length:
            self._engine.rollback(state.inner, length - state.offset)

    def release(self, row: Row) -> None:
        state = self._rows.pop(row)
        state.group.rows.remove(state)
        self._answers = [answer for answer in self._answers if answer[0] != row]
        if state.inner is None:
            self._waiting -= 1
        else:
            self._outer.pop(state.inner, None)
            self._engine.release(state.inner)

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        self._engine.load_weights(weights, version)
