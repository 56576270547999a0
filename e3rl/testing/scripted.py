"""An engine without a model: candidates come from a script and time from a virtual clock.

It tests code that uses an engine, by value and without waiting::

    engine = ScriptedEngine({Key("p", sibling=0, segment=0): Scripted((0.5, 2.0, 0.1))}, max_rows=8)

It keeps the contract of `e3rl.engine.protocol.Engine`, raises `Misuse` on misuse, and records every call with its tick.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from e3rl.engine.protocol import Row, Sampling
from e3rl.types import Candidate, Draw

EOS = 0
"""The id that ends a scripted candidate; no other scripted token has it."""

SPREAD = 7919  # a prime: a candidate's ids differ from each other


class Key(NamedTuple):
    """Which candidate a script entry is for. A plain tuple of the same four values also works."""

    prompt_id: str
    sibling: int
    segment: int
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Scripted:
    """The content of a candidate. Tokens beyond the number asked for are cut off, an ending among them too."""

    entropies: tuple[float, ...]
    perturbations: tuple[float, ...] = ()  # empty: 0 each
    ended: bool = False

    def __post_init__(self) -> None:
        if self.perturbations and len(self.perturbations) != len(self.entropies):
            raise Misuse(f"{len(self.perturbations)} perturbations for {len(self.entropies)} entropies")


Script = Mapping[tuple[str, int, int, int], Scripted] | Callable[[Draw, int], Scripted]
"""Candidates by `Key`, or a function of a draw and the number of tokens asked for."""


class Misuse(AssertionError):
    """The engine was used against its contract."""


@dataclass(frozen=True, slots=True)
class Call:
    """Something that happened to a row. ``tokens``: asked, delivered or kept; ``draw`` of 'extend' and 'deliver'."""

    tick: int
    kind: Literal["prefill", "extend", "deliver", "rollback", "release"]
    row: Row
    tokens: int = 0
    draw: Draw | None = None


@dataclass(slots=True)
class _Request:
    draw: Draw
    candidate: Candidate
    remaining: int


@dataclass(slots=True)
class _Row:
    ids: list[int]
    request: _Request | None = None


def scripted_candidate(draw: Draw, scripted: Scripted, tokens: int) -> Candidate:
    """The candidate of a script entry. Its ids depend only on the draw and differ between draws."""
    entropies = scripted.entropies[:tokens]
    ended = scripted.ended and len(scripted.entropies) <= tokens
    if not entropies or (len(entropies) < tokens and not ended):
        raise Misuse(f"the script has {len(entropies)} of {tokens} tokens and no ending for {draw}")
    key = zlib.crc32(repr(draw).encode())
    ids = [1 + (key + t * SPREAD) % 1_000_000 for t in range(len(entropies))]
    if ended:
        ids[-1] = EOS
    perturbations = scripted.perturbations[:tokens] or (0.0,) * len(entropies)
    ones = (1.0,) * len(entropies)
    return Candidate(ids, [-h for h in entropies], entropies, perturbations, ones, (1,) * len(entropies), ended)


class ScriptedEngine:
    """An `Engine` that follows a script.

    One tick generates one token of each of the ``max_rows`` oldest open requests, unless ``ticks`` says how long a
    candidate of so many tokens takes. ``shuffle`` randomises the order of candidates that complete together.
    ``calls`` and ``batch_sizes`` (active rows by tick) record what happened.
    """

    def __init__(
        self,
        script: Script,
        *,
        max_rows: int = 64,
        cache_rows: int = 128,
        ticks: Callable[[Draw, int], int] | None = None,
        shuffle: random.Random | None = None,
    ) -> None:
        self._script = script
        self._max_rows = max_rows
        self._cache_rows = cache_rows
        self._ticks = ticks or (lambda draw, tokens: tokens)
        self._shuffle = shuffle
        self._rows: dict[Row, _Row] = {}
        self._open: list[Row] = []
        self._handles = 0
        self.calls: list[Call] = []
        self.batch_sizes: list[int] = []

    @property
    def clock(self) -> int:
        """Ticks so far."""
        return len(self.batch_sizes)

    @property
    def held(self) -> int:
        """Rows that are not released."""
        return len(self._rows)

    def free_rows(self) -> int:
        """Rows that may still be made."""
        return self._cache_rows - len(self._rows)

    def prefill(self, prompt_ids: Sequence[int], siblings: int) -> list[Row]:
        """Rows that all continue a prompt; takes no time."""
        if siblings > self.free_rows():
            raise Misuse(f"prefill of {siblings} rows, {self.free_rows()} are free")
        rows = [Row(self._handles + i) for i in range(siblings)]
        self._handles += siblings
        for row in rows:
            self._rows[row] = _Row([])
            self._note("prefill", row, len(prompt_ids))
        return rows

    def length(self, row: Row) -> int:
        """Generated tokens that the row holds."""
        return len(self._row(row).ids)

    def extend(self, row: Row, tokens: int, draw: Draw, sampling: Sampling) -> None:
        """Queue the scripted candidate of ``draw``."""
        state = self._idle(row)
        scripted = self._script(draw, tokens) if callable(self._script) else self._look_up(self._script, draw)
        candidate = scripted_candidate(draw, scripted, tokens)
        state.request = _Request(draw, candidate, self._ticks(draw, len(candidate.ids)))
        self._open.append(row)
        self._note("extend", row, tokens, draw)

    def poll(self) -> list[tuple[Row, Candidate]]:
        """Let the clock run until a candidate is complete."""
        if not self._open:
            return []
        batch = self._open[: self._max_rows]
        ticks = min(self._request(row).remaining for row in batch)
        self.batch_sizes += [len(batch)] * ticks
        for row in batch:
            self._request(row).remaining -= ticks
        complete = [row for row in batch if self._request(row).remaining == 0]
        if self._shuffle is not None:
            self._shuffle.shuffle(complete)
        return [(row, self._deliver(row)) for row in complete]

    def rollback(self, row: Row, length: int) -> None:
        """Drop generated tokens beyond ``length``; takes no time."""
        state = self._idle(row)
        if not 0 <= length <= len(state.ids):
            raise Misuse(f"rollback of row {row} to {length} tokens, it has {len(state.ids)}")
        del state.ids[length:]
        self._note("rollback", row, length)

    def release(self, row: Row) -> None:
        """Forget the row, and its request if one is open."""
        if self._row(row).request is not None:
            self._open.remove(row)
        del self._rows[row]
        self._note("release", row)

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """A script has no weights; refuses only what the contract refuses."""
        if self._rows:
            raise Misuse(f"load_weights while {len(self._rows)} rows are held")

    def made(self, kind: str) -> list[Call]:
        """The calls of one kind, in order."""
        return [call for call in self.calls if call.kind == kind]

    def _deliver(self, row: Row) -> Candidate:
        state, request = self._row(row), self._request(row)
        state.ids += request.candidate.ids.tolist()
        state.request = None
        self._open.remove(row)
        self._note("deliver", row, len(request.candidate.ids), request.draw)
        return request.candidate

    def _row(self, row: Row) -> _Row:
        if row not in self._rows:
            raise Misuse(f"row {row} is not held: it was released or never made")
        return self._rows[row]

    def _idle(self, row: Row) -> _Row:
        state = self._row(row)
        if state.request is not None:
            raise Misuse(f"row {row} has an open request: {state.request.draw}")
        return state

    def _request(self, row: Row) -> _Request:
        request = self._row(row).request
        assert request is not None
        return request

    @staticmethod
    def _look_up(script: Mapping[tuple[str, int, int, int], Scripted], draw: Draw) -> Scripted:
        key = Key(draw.prompt_id, draw.sibling, draw.segment, draw.attempt)
        if key not in script:
            raise Misuse(f"the script has no entry for {key}")
        return script[key]

    def _note(
        self,
        kind: Literal["prefill", "extend", "deliver", "rollback", "release"],
        row: Row,
        tokens: int = 0,
        draw: Draw | None = None,
    ) -> None:
        self.calls.append(Call(self.clock, kind, row, tokens, draw))
