"""The thread that owns the engine: groups of several clients decode together, each by its own settings.

A new group joins whenever rows are free, in the order of asking; a group whose client has gone leaves at once. Handing
over is the only thing that other threads do here: everything that touches the engine runs on this thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue

from e3rl.engine.protocol import Engine, Row
from e3rl.errors import SickLogits, UserError
from e3rl.rollout.group import Event, Extend, Finished, GroupRollout, Order
from e3rl.rollout.scheduler import Scheduler
from e3rl.serve.errors import ApiError, as_api_error
from e3rl.types import Draw, Prompt


@dataclass(frozen=True)
class Failed:
    """The request can't be finished."""

    error: ApiError


Outbox = SimpleQueue[tuple[int, Event] | Failed]


@dataclass(frozen=True, eq=False)
class Ticket:
    """One group that a client wants: what is decoded, how, and where its events go, under ``index``."""

    prompt: Prompt
    scheduler: Scheduler
    index: int
    outbox: Outbox
    cancelled: threading.Event

    def tell(self, event: Event) -> None:
        """Hand an event over to whoever waits for this group."""
        self.outbox.put((self.index, event))


@dataclass(eq=False)
class _Flight:
    ticket: Ticket
    rollout: GroupRollout
    rows: Sequence[Row]
    held: set[Row] = field(default_factory=set)
    draws: dict[Row, Draw] = field(default_factory=dict)  # of the requests that are open


class DecodingWorker:
    """Decodes tickets until stopped. At most ``queue_limit`` of them wait for rows."""

    def __init__(self, engine: Engine, *, rows: int, queue_limit: int) -> None:
        self.rows, self._queue_limit = rows, queue_limit
        self._engine = engine
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._flights: list[_Flight] = []
        self._places: dict[Row, tuple[_Flight, int]] = {}
        self._thread = threading.Thread(target=self._run, name="e3rl-decoding", daemon=True)
        self._thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue the tickets of one request, all or none."""
        if len(tickets) > self._queue_limit:
            raise ApiError(400, f"{len(tickets)} prompts, and at most {self._queue_limit} groups may wait here")
        with self._changed:
            if self._stopping:
                raise ApiError(503, "the server is stopping")
            if len(self._waiting) + len(tickets) > self._queue_limit:
                raise ApiError(503, f"{len(self._waiting)} groups wait already; try again soon", code="overloaded")
            self._waiting.extend(tickets)
            self._changed.notify()

    def load(self) -> dict[str, int]:
        """How much is decoding and waiting now."""
        return {"decoding": len(self._flights), "waiting": len(self._waiting)}

    def wake(self) -> None:
        """Look at once whether something was cancelled."""
        with self._changed:
            self._changed.notify()

    def stop(self) -> None:
        """Refuse what waits, drop what decodes, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._drop_cancelled()
                self._admit()
                if self._places:
                    self._advance()
        finally:  # whatever ended the loop, nobody may wait for ever
            self._close(ApiError(503, "the server is stopping"))

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._waiting or self._flights or self._stopping):
                self._changed.wait()
            return not self._stopping

    def _drop_cancelled(self) -> None:
        for flight in [f for f in self._flights if f.ticket.cancelled.is_set()]:
            self._leave(flight)

    def _next_ticket(self) -> Ticket | None:
        """The oldest waiting ticket, if its rows are free."""
        with self._changed:
            while self._waiting and self._waiting[0].cancelled.is_set():
                self._waiting.popleft()
            if self._waiting and self._waiting[0].scheduler.rollout.num_generations <= self._engine.free_rows():
                return self._waiting.popleft()
            return None

    def _admit(self) -> None:
        while ticket := self._next_ticket():
            try:
                rollout = ticket.scheduler.group_rollout(ticket.prompt)
                rows = self._engine.prefill(ticket.prompt.ids, ticket.scheduler.rollout.num_generations)
            except Exception as error:  # such as memory that runs out: this request's failure, not the server's
                ticket.outbox.put(Failed(_reason(error)))
                continue
            flight = _Flight(ticket, rollout, rows, set(rows))
            self._flights.append(flight)
            self._places |= {row: (flight, sibling) for sibling, row in enumerate(rows)}
            self._proceed(flight, rollout.start)

    def _advance(self) -> None:
        """Let the engine complete something and hand it on. Non-finite logits fail the group that they belong to."""
        try:
            completed = self._engine.poll()
        except SickLogits as error:
            for flight in self._flights_of(error.draw):
                self._fail(flight, error)
            return
        except Exception as error:  # nobody knows whose: all that was decoding fails, the thread and the queue live on
            for flight in list(self._flights):
                self._fail(flight, error)
            return
        for row, candidate in completed:
            if row not in self._places:  # its group has failed a moment ago
                continue
            flight, sibling = self._places[row]
            self._proceed(flight, partial(flight.rollout.deliver, sibling, candidate))

    def _proceed(self, flight: _Flight, orders: Callable[[], Iterable[Order]]) -> None:
        """Carry out what a group asks for next. Whatever goes wrong in it is this group's failure and nobody else's."""
        try:
            for order in orders():
                row = flight.rows[order.sibling]
                if isinstance(order, Extend):
                    self._extend(flight, row, order)
                else:
                    self._release(flight, row)
            if flight.rollout.finished:
                self._flights.remove(flight)
                flight.ticket.tell(Finished(flight.rollout.group(policy_version=0)))
        except Exception as error:
            self._fail(flight, error)

    def _flights_of(self, draw: Draw) -> list[_Flight]:
        """The group that asked for a draw. Clients may have chosen the same seed: the very object tells them apart."""
        same = [f for f in self._flights if any(d is draw for d in f.draws.values())]
        equal = [f for f in self._flights if draw in f.draws.values()]
        return same or equal or list(self._flights)

    def _extend(self, flight: _Flight, row: Row, order: Extend) -> None:
        if self._engine.length(row) > order.start:
            self._engine.rollback(row, order.start)
        ticket = flight.ticket
        scheduler = ticket.scheduler
        draw = Draw(scheduler.seed, 0, ticket.prompt.problem.id, order.sibling, order.segment, order.attempt)
        flight.draws[row] = draw
        self._engine.extend(row, order.tokens, draw, scheduler.sampling)

    def _release(self, flight: _Flight, row: Row) -> None:
        flight.held.remove(row)
        flight.draws.pop(row, None)
        del self._places[row]
        self._engine.release(row)

    def _leave(self, flight: _Flight) -> None:
        """Forget a group; its rows are given back, each even where another one's release fails."""
        if flight in self._flights:
            self._flights.remove(flight)
        held, flight.held = flight.held, set()
        for row in held:
            self._places.pop(row, None)
            with contextlib.suppress(Exception):  # a row that the engine can't give back is lost; the others go on
                self._engine.release(row)

    def _fail(self, flight: _Flight, error: Exception) -> None:
        self._leave(flight)
        flight.ticket.outbox.put(Failed(_reason(error)))

    def _close(self, error: ApiError) -> None:
        with self._changed:
            self._stopping = True
            tickets = [*(f.ticket for f in self._flights), *self._waiting]
            self._flights, self._waiting = [], deque()
        for ticket in tickets:
            ticket.outbox.put(Failed(error))


def _reason(error: Exception) -> ApiError:
    """What a client is told: a sentence made for people, or the kind of error alone."""
    if isinstance(error, UserError) and not isinstance(error, SickLogits):
        return as_api_error(error)
    return ApiError(500, str(error) if isinstance(error, SickLogits) else f"decoding failed: {type(error).__name__}")
