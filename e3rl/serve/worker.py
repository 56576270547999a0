"""The thread that owns the engine: groups of several clients decode together, each by its own settings.

A new group joins whenever rows are free, the client's first that has the fewest rows, and a group whose client has gone leaves:
both interrupt the engine, in the middle of a segment, where it is an `InterruptibleEngine`. Other threads only
hand over work: everything that touches the engine runs on this thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from e3rl.engine.protocol import Engine
from e3rl.errors import NonFiniteLogits, UserError
from e3rl.rollout.driver import Driver
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.jobs import GroupJob
from e3rl.rollout.orders import Event
from e3rl.serve.errors import ApiError, as_api_error
from e3rl.types import Prompt

MOST_QUEUES = 4
"""Full queues of clients that there is room for; one less for the clients of an address."""


@dataclass(frozen=True)
class Failed:
    """The request can't be finished."""

    error: ApiError


class Outbox:
    """A queue of a request's events from the decoding thread to the event loop that made this."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event] | Failed] = asyncio.Queue()

    def put(self, message: tuple[int, Event] | Failed) -> None:
        """Called by any thread. Messages for a loop that has ended are dropped."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, message)

    async def get(self) -> tuple[int, Event] | Failed:
        """The next message, as soon as there is one."""
        return await self._queue.get()


@dataclass(frozen=True, eq=False)
class Ticket:
    """One group that a client wants: what is decoded, how, and where its events go, under ``index``."""

    prompt: Prompt
    settings: GroupSettings
    index: int
    outbox: Outbox
    cancelled: threading.Event
    client: tuple[str, ...] = ()  # who asks, address first: rows are shared among clients
    follow: bool = False  # tell of tokens as they are drawn

    def tell(self, event: Event) -> None:
        """Pass an event to the client that waits for this group."""
        self.outbox.put((self.index, event))


class DecodingWorker:
    """Decodes tickets until stopped. At most ``queue_limit`` of a client wait for rows, `MOST_QUEUES` times as many of all."""

    def __init__(self, engine: Engine, *, rows: int, queue_limit: int) -> None:
        self.rows, self._queue_limit = rows, queue_limit
        self._engine, self._driver = engine, Driver(engine)
        self._interrupt_engine = getattr(engine, "interrupt", _no_interrupt)
        self._arrived: list[Ticket] = []
        self._tickets: dict[GroupJob, Ticket] = {}  # that the driver has
        self._changed = threading.Condition()
        self._stopping = self._draining = False
        self._thread = threading.Thread(target=self._run, name="e3rl-decoding", daemon=True)
        self._thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue the tickets of one request, which are one client's, all or none."""
        if len(tickets) > self._queue_limit:
            raise ApiError(400, f"{len(tickets)} prompts, and at most {self._queue_limit} groups may wait here")
        with self._changed:
            if self._stopping or self._draining:
                raise ApiError(503, "the server is stopping")
            client, all_of = tickets[0].client, self.load()["waiting"]
            own, near = self._waiting_of(client), self._waiting_of(client[:1])
            for waiting, whose, queues in (
                (own, f"{own} of your groups", 1),
                (near, f"{near} groups from your address", MOST_QUEUES - 1),
                (all_of, f"{all_of} groups", MOST_QUEUES),
            ):
                if waiting + len(tickets) > queues * self._queue_limit:
                    raise ApiError(429, f"{whose} wait already; try again soon", code="overloaded")
            self._arrived.extend(tickets)
            self._changed.notify()
        if self._engine.free_rows() and not own:  # else rows become free only when a group ends
            self._interrupt()

    def _waiting_of(self, client: tuple[str, ...]) -> int:
        """Groups that wait for rows of the clients whose names begin so."""
        arrived = sum(ticket.client[: len(client)] == client for ticket in self._arrived)
        return arrived + self._driver.waiting_of(client)

    def _interrupt(self) -> None:
        """Have the step under way return, whether it decodes or waits for tools."""
        self._interrupt_engine()
        self._driver.wake()

    def load(self) -> dict[str, int]:
        """How much is decoding and waiting now."""
        return {"decoding": self._driver.decoding, "waiting": len(self._arrived) + self._driver.waiting}

    def wake(self) -> None:
        """Look at once whether something was cancelled."""
        with self._changed:
            self._changed.notify()
        if any(ticket.cancelled.is_set() for ticket in list(self._tickets.values())):  # and not ended meanwhile
            self._interrupt()

    def drain(self) -> bool:
        """Refuse new requests from now on; whether earlier ones are still under way."""
        self._draining = True
        return bool(self._tickets or self._arrived)

    def stop(self) -> None:
        """Refuse what waits, drop what decodes, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._interrupt()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_work():
                for job in [job for job, ticket in self._tickets.items() if ticket.cancelled.is_set()]:
                    del self._tickets[job]
                    with contextlib.suppress(Exception):  # a row that can't be given back is lost; the others go on
                        self._driver.cancel(job)
                for job in self._driver.step():
                    ticket = self._tickets.pop(job)
                    if job.error is not None:
                        ticket.outbox.put(Failed(_said_to_client(job.error)))
        finally:  # whatever ended the loop, no client may wait for ever
            self._close(ApiError(503, "the server is stopping"))

    def _take_work(self) -> bool:
        """Wait until there is something to do and give the driver what has arrived; False where the server stops."""
        with self._changed:
            while not (self._arrived or self._driver.busy or self._stopping):
                self._changed.wait()
            for ticket in self._arrived:  # under the lock, so that each counts as waiting exactly once
                self._tickets[self._submitted(ticket)] = ticket
            self._arrived.clear()
            return not self._stopping

    def _submitted(self, ticket: Ticket) -> GroupJob:
        asked = ticket.prompt, ticket.settings, ticket.tell
        return self._driver.submit(*asked, client=ticket.client, follow=ticket.follow)

    def _close(self, error: ApiError) -> None:
        with self._changed:
            self._stopping = True
            tickets = [*self._tickets.values(), *self._arrived]
            self._tickets, self._arrived = {}, []
        for ticket in tickets:
            ticket.outbox.put(Failed(error))
        self._driver.close()


def _no_interrupt() -> None:
    """For an engine whose poll ends when a candidate is complete."""


def _said_to_client(error: Exception) -> ApiError:
    """What stopped a group: the request's fault where the library says so, else the server's."""
    if isinstance(error, NonFiniteLogits):
        return ApiError(500, str(error))
    if isinstance(error, UserError):
        return as_api_error(error)
    return ApiError(500, f"decoding failed: {type(error).__name__}")
