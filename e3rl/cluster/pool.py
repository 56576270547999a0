"""Hands groups out to rollout workers, takes them back, and replaces workers that are lost.

Which worker makes a group changes nothing about it: its draws are named by problem, sibling, segment and attempt. So a lost
worker's groups are made again by any other, and the first result of a group is its result.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from e3rl.cluster.broadcast import Broadcaster
from e3rl.cluster.messages import Answer, Ask, Hello, Task, check_hello, decode_answer, group_of
from e3rl.cluster.open_groups import OpenGroups
from e3rl.cluster.wire import decode, encode
from e3rl.errors import NonFiniteLogits, UserError
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.ipc import problem_of
from e3rl.types import Group, Prompt
from e3rl.weights.publish import Published, this_node


class WorkerLost(Exception):
    """A worker can't be reached, has hung or answers nonsense. Its groups are made again elsewhere."""


class Connection(Protocol):
    """A worker that has been reached. Every call ends: in time, or with WorkerLost."""

    def hello(self) -> bytes: ...

    def exchange(self, body: bytes) -> bytes: ...

    def load_weights(self, version: int, weights: bytes | memoryview, named: str) -> None: ...

    def take_weights(self, offer: bytes) -> bytes: ...

    def receive_weights(self, body: bytes) -> None: ...

    def address(self) -> str: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Place:
    """Where a worker is, or can be started: ``connect`` gives a new one each time, or raises WorkerLost."""

    name: str
    connect: Callable[[], Connection]


@dataclass(frozen=True)
class Terms:
    """What every worker must match, and the pool's timeouts."""

    architecture: str
    vocabulary: int
    longest: int  # tokens of prompt and response
    timeout: float  # seconds without a sign of life
    poll: float = 1.0  # seconds that a worker may delay an answer until something is finished
    attempts: int = 3  # losses in a row, with nothing finished between them, before a worker is given up


class WorkerPool:
    """Workers at fixed places. One thread per place talks to its worker; the caller's thread takes finished groups."""

    def __init__(
        self,
        places: Sequence[Place],
        terms: Terms,
        note: Callable[[str], None] = lambda _: None,
        broadcaster: Broadcaster | None = None,
    ) -> None:
        if not places:
            raise UserError("no rollout workers: set rollout.workers or rollout.servers")
        self._seats = [_Seat(place, terms) for place in places]
        self._terms, self._note = terms, note
        self._weights: Published | None = None
        self._broadcaster = broadcaster

    def load_weights(self, weights: Published) -> None:
        """New weights, between two runs. Each worker gets them before its next group."""
        self._weights = weights
        if self._broadcaster is not None:
            self._broadcaster.publish(weights, self._seats)

    def run(self, prompts: Sequence[Prompt], settings: GroupSettings, tick: Callable[[], None]) -> Iterator[Group]:
        """Yield groups as they finish, each once. ``tick`` is called about once a second and may raise to stop."""
        batch = OpenGroups(prompts, len(self._seats))
        threads = [
            threading.Thread(target=self._serve, args=(seat, batch, settings), name=seat.place.name, daemon=True)
            for seat in self._seats
        ]
        for thread in threads:
            thread.start()
        try:
            while not batch.all_delivered:
                tick()
                yield from batch.delivered(self._terms.poll)
        finally:
            batch.stop()
            for thread in threads:
                thread.join(2 * self._terms.poll)

    def _serve(self, seat: _Seat, batch: OpenGroups, settings: GroupSettings) -> None:
        """Keep one worker busy until the batch is done; begin anew with another when it is lost."""
        losses: list[str] = []
        with seat.lock:
            while not batch.over:
                weights = self._weights
                assert weights is not None
                try:
                    worker = seat.ready(weights, settings.rollout.num_generations)
                    _Shift(seat, worker, batch, settings, self._terms).work()
                    return
                except WorkerLost as lost:
                    seat.drop()
                    losses = [] if seat.useful else losses
                    losses.append(str(lost))
                    self._note(f"rollout worker {seat.place.name} is lost: {lost}; its groups are made again")
                    if len(losses) >= self._terms.attempts:
                        batch.give_up(f"{seat.place.name}: {losses[-1]}")
                        return
                    batch.pause(self._terms.poll * 4 ** (len(losses) - 1))  # a server that is being restarted
                except Exception as error:  # ends the run: raised in the caller's thread
                    if isinstance(error, UserError) and weights is not self._weights:
                        continue  # newer weights were published while it took these
                    batch.fail(error)
                    return

    def close(self) -> None:
        """Let all workers go."""
        for seat in self._seats:
            seat.drop()
        if self._broadcaster is not None:
            self._broadcaster.close_group()


class _Seat:
    """A place and the worker that is there now."""

    def __init__(self, place: Place, terms: Terms) -> None:
        self.place, self._terms = place, terms
        self.lock = threading.Lock()
        self.rows = 0
        self.useful = False  # the present worker has finished a group
        self._worker: Connection | None = None
        self.version: int | None = None
        self._far = False  # on another machine

    def hearer(self) -> Connection | None:
        """See `e3rl.cluster.broadcast.BroadcastSeat`."""
        return self._worker if self._far else None

    def ready(self, weights: Published, siblings: int) -> Connection:
        """The worker, checked and with these weights."""
        if self._worker is None:
            self._worker = self.place.connect()
            self.version, self.useful = None, False
        try:
            hello = decode(Hello, self._worker.hello())
        except ValueError as error:
            raise WorkerLost(f"it is no rollout worker of e3rl: {error}") from None
        obstacle = check_hello(hello, self._terms.architecture, self._terms.longest, siblings)
        if obstacle:
            raise UserError(f"rollout worker {self.place.name} can't be used: {obstacle}")
        self.rows = hello.rows
        self._far = hello.node != this_node() or not hello.node
        if self.version != weights.version:
            self.version = None
            if self._far or self._worker.take_weights(encode(weights.offer)):
                with weights.image() as image:
                    self._worker.load_weights(weights.version, image, weights.offer.checksum)
            self.version = weights.version
        return self._worker

    def drop(self) -> None:
        """Close the connection to the worker."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()


class _Shift:
    """One worker's part in one batch."""

    def __init__(
        self, seat: _Seat, worker: Connection, batch: OpenGroups, settings: GroupSettings, terms: Terms
    ) -> None:
        self._seat, self._worker, self._batch, self._settings, self._terms = seat, worker, batch, settings, terms
        self._run = uuid.uuid4().hex
        self._mine: dict[str, Prompt] = {}
        self._room = max(1, seat.rows // settings.rollout.num_generations)
        self._beat, self._alive = -1, time.monotonic()

    def work(self) -> None:
        """Until the batch is over. WorkerLost puts this worker's groups back."""
        try:
            while not self._batch.over:
                tasks = self._batch.take(self._room - len(self._mine))
                self._mine |= {prompt.problem.id: prompt for prompt in tasks}
                if self._mine:
                    self._talk(tasks)
                else:
                    self._batch.rest(self._terms.poll)
                    self._alive = time.monotonic()
        except WorkerLost:
            self._batch.put_back(list(self._mine))
            raise

    def _talk(self, prompts: Sequence[Prompt]) -> None:
        tasks, tools = (
            tuple(map(Task.of, prompts)),
            next((p.tools.identity for p in self._mine.values() if p.tools), ""),
        )
        body = self._worker.exchange(encode(Ask(self._run, self._settings, tasks, self._terms.poll, tools)))
        try:
            answer, batches = decode_answer(body)
            if answer.run != self._run or any(problem_of(batch) not in self._mine for batch in batches):
                raise ValueError("it speaks of groups that it was not asked for")
            groups = [
                group_of(batch, self._mine[problem_of(batch)], self._settings, self._terms.vocabulary)
                for batch in batches
            ]
        except ValueError as error:
            raise WorkerLost(f"what it answers can't be used: {error}") from None
        if answer.fault is not None:
            raise _as_error(answer, self._seat.place.name)
        for group in groups:
            self._mine.pop(group.prompt.problem.id, None)  # an HTTP client may repeat a call, and get two answers
            self._seat.useful = True
            self._batch.deliver(group)
        self._watch(answer.beat, bool(groups))

    def _watch(self, beat: int, useful: bool) -> None:
        now = time.monotonic()
        if beat != self._beat or useful:
            self._beat, self._alive = beat, now
        elif now - self._alive > self._terms.timeout:
            raise WorkerLost(f"it has generated nothing for {self._terms.timeout:g} s (rollout.worker_timeout)")


def _as_error(answer: Answer, name: str) -> Exception:
    fault = answer.fault
    assert fault is not None
    if fault.draw is not None:
        return NonFiniteLogits(fault.draw)
    return UserError(f"rollout worker {name} can't go on: {fault.message}")
