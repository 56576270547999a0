"""Environments that answer turns while the engine decodes, and the memory of candidates and answers."""

from __future__ import annotations

import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import numpy as np

from e3rl.environments.protocol import Episode, Reply
from e3rl.plugins import ProcessState
from e3rl.rollout.orders import Act, Undo
from e3rl.types import Candidate, Draw, Observed, Prompt, ToolResult


class Memory(Protocol):
    """Candidates and answers by draw, also those of an earlier process (`e3rl.train.journal.StepJournal`)."""

    def take(self, draw: Draw) -> Candidate | None:
        """The candidate of this draw if it is known; each is returned once."""

    def add(self, draw: Draw, candidate: Candidate) -> None:
        """Keep a candidate that was generated."""

    def take_reply(self, draw: Draw) -> Reply | None:
        """The environment's answer of this name if it is known."""

    def add_reply(self, draw: Draw, reply: Reply) -> None:
        """Keep what an environment answered."""

    def flush(self) -> None:
        """What was added must survive this process."""


def given(ids: Sequence[int]) -> Candidate:
    """Observation tokens as a candidate: log-probability, entropy, perturbation and rank 0."""
    zeros = np.zeros(len(ids))
    return Candidate(ids, zeros, zeros, zeros, np.ones(len(ids)), np.zeros(len(ids)), ended=False)


def joined(candidates: Sequence[Candidate]) -> Candidate:
    """The segments of a turn as one candidate."""
    columns = [np.concatenate(column) for column in zip(*(c.columns() for c in candidates), strict=True)]
    return Candidate(*columns, ended=candidates[-1].ended)  # type: ignore[misc, arg-type]


@dataclass(slots=True)
class _Acting:
    owner: object
    done: Callable[[Reply], None]
    limit: float
    deadline: float = math.inf

    def begin(self) -> None:
        """A call begins, with the whole limit for itself."""
        self.deadline = time.monotonic() + self.limit

    def late(self) -> bool:
        """Whether the limit has passed since the last `begin`."""
        return time.monotonic() > self.deadline

    def too_late(self) -> Reply:
        """The answer of an environment that is late."""
        return Reply(failure=f"took longer than {self.limit:g} s")


class _GivenUp(Exception):
    """Nobody waits for the turn any more."""


_AWAKE = object()


@dataclass
class Actors:
    """Runs environments, one thread a turn, while the engine decodes other rows.

    Each call of a turn has the deadline for itself. A thread that is late is abandoned; it begins no further call.

    A turn at whose end the process is in another directory has failed, and the directory is put back. Whose tool went there
    isn't known: of turns that run at the same moment it may be another's. Umask and locale are put back and that is said;
    changed variables and import path are said.
    """

    memory: Memory | None = None
    _begun: int = 0
    _place: str = field(default_factory=os.getcwd)
    _finished: queue.SimpleQueue[tuple[object, Reply]] = field(default_factory=queue.SimpleQueue)
    _acting: dict[object, _Acting] = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        """Whether a turn is being answered."""
        return bool(self._acting)

    def beat(self) -> int:
        """How often a call, or what goes before or after one, has begun: it stands still only while one of them lasts."""
        return self._begun

    def answer(
        self,
        owner: object,
        prompt: Prompt,
        episodes: dict[int, Episode],
        order: Act | Undo,
        draw: Draw | None,
        done: Callable[[Reply], None],
    ) -> None:
        """Have a sibling's environment answer its turn, or go back to where it was before the last one.

        A remembered answer counts; the tools run again for their state.
        """
        limit = prompt.tools.deadline
        if isinstance(order, Undo):
            undo = episodes[order.sibling].undo
            self._start(lambda _: undo(), _Acting(owner, done, limit))
            return
        sibling, ids = order.sibling, order.ids
        assert draw is not None
        known = None if self.memory is None else self.memory.take_reply(draw)

        def act(begin: Callable[[], None]) -> Reply:
            if known is not None and known.failure is not None:
                return known
            if sibling not in episodes:
                episodes[sibling] = prompt.tools.open(prompt.problem)
            reply = episodes[sibling].act(ids, begin)
            return known or reply

        def kept(reply: Reply) -> None:
            if self.memory is not None and known is None:
                self.memory.add_reply(draw, reply)
                self.memory.flush()
            done(reply)

        self._start(act, _Acting(owner, kept, limit))

    def _start(self, act: Callable[[Callable[[], None]], Reply], acting: _Acting) -> None:
        token = object()

        def begin() -> None:
            if acting.late() or token not in self._acting:
                raise _GivenUp
            acting.begin()
            self._begun += 1

        def run() -> None:
            before = replace(ProcessState.now(), directory=self._place)
            try:
                reply = act(begin)
                reply = acting.too_late() if acting.late() else reply
            except _GivenUp:
                reply = acting.too_late()
            except BaseException as error:  # user code, in a thread that nobody joins
                reply = Reply(failure=f"raised {type(error).__name__}: {error}")
            if said := before.restore():
                reply = Reply(failure=said)
            self._finished.put((token, reply))

        acting.begin()
        self._acting[token] = acting
        threading.Thread(target=run, name="e3rl-environment", daemon=True).start()

    def forget(self, owner: object) -> None:
        """Drop the answers that ``owner`` still waits for."""
        self._acting = {token: acting for token, acting in self._acting.items() if acting.owner is not owner}

    def wake(self) -> None:
        """Called by any thread: `replies` returns, with or without an answer."""
        if self._acting:
            self._finished.put((_AWAKE, Reply()))

    def replies(self, wait: bool) -> Iterator[tuple[Callable[[Reply], None], Reply]]:
        """Answers that have arrived, and failures of overdue ones; with ``wait``, at least one, unless woken."""
        found = False
        while self._acting:
            overdue = min(self._acting.values(), key=lambda a: a.deadline)
            patience = max(0.0, overdue.deadline - time.monotonic()) if wait and not found else 0.0
            try:
                token, reply = self._finished.get(timeout=patience) if patience else self._finished.get_nowait()
            except queue.Empty:
                late = [t for t, a in self._acting.items() if a.late()]
                for token in late:
                    if acting := self._acting.pop(token, None):  # else given up on while another was handed on
                        found = True
                        yield acting.done, acting.too_late()
                if found or not wait:
                    return
                continue
            if token is _AWAKE:
                return
            if token in self._acting:  # else it was given up on
                found = True
                yield self._acting.pop(token).done, reply


def to_json(observation: Observed) -> str:
    """An observation as JSON."""
    found = asdict(observation)
    del found["seconds"]  # else no two runs would be equal
    return json.dumps(found, ensure_ascii=True)


def from_json(text: str) -> Observed:
    """What `to_json` was given; ValueError where it can't have come from it."""
    try:
        found = json.loads(text)
        observed = Observed(**{**found, "calls": tuple(ToolResult(**call) for call in found["calls"])})
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"an observation that is none ({error})") from None
    _require(observed, state=(int,), evidence=(int, float), forced=(bool,))
    for call in observed.calls:
        _require(call, name=(str,), arguments=(str,), result=(str,), failed=(bool,))
    return observed


def _require(item: Observed | ToolResult, **kinds: tuple[type, ...]) -> None:
    for name, kind in kinds.items():
        value = getattr(item, name)
        if not isinstance(value, kind) or value != value:
            raise ValueError(f"an observation that is none ({name} is {str(value)[:60]})")
