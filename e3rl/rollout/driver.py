"""One driver of an engine: groups are submitted, stepped and cancelled. Batches, the server and rollout workers use the same one.

No request waits for another sibling's retry or for another group; the only wait is a group's barrier (`judge`). Nothing
here knows what a KV cache or an entropy is.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, cast

from e3rl.engine.protocol import Engine, Row, ServingEngine
from e3rl.environments.protocol import Reply
from e3rl.errors import NonFiniteLogits, UserError
from e3rl.rollout.group import GroupRollout, GroupSettings
from e3rl.rollout.jobs import GroupJob, next_group
from e3rl.rollout.orders import Act, Event, Extend, Order, Release, Undo
from e3rl.rollout.rows import GroupRows
from e3rl.rollout.turns import Actors, Memory
from e3rl.types import Candidate, Draw, Prompt

if TYPE_CHECKING:
    from torch import Tensor

Observer = Callable[[Event], None]


FOLLOWED_STEPS = 4
"""Tokens a row between two looks at what groups that are followed (`GroupJob.follow`) have drawn."""


def _ignore(event: Event) -> None:
    """The observer of groups without one."""


Delivery = tuple[GroupJob, int, Draw, Candidate]
"""A candidate, its group and sibling, and the draw that names it."""


class Driver:
    """Decodes any number of groups on one engine, each by its own settings.

    A group waits until rows are free for all of it. Rows go to the client that has the fewest then, and within a client in the
    order of submission. While rows for the next group are not free, no other begins.

    A group's failure is its own: bad settings, a prompt that doesn't fit, non-finite logits. Where the engine fails, all
    groups that are decoding fail. What ``memory`` knows of a group is not generated again. Not thread-safe.
    """

    def __init__(self, engine: Engine, memory: Memory | None = None) -> None:
        self._engine, self._memory = engine, memory
        self._serving = cast("ServingEngine", engine)  # what it is where groups are followed
        self._interruptible = hasattr(engine, "interrupt")  # then a poll may complete nothing
        self._waiting: deque[GroupJob] = deque()
        self._decoding: list[GroupJob] = []
        self._ended: list[GroupJob] = []  # and `step` has not returned them yet
        self._parking = False  # no segment may begin
        self._open: dict[Row, tuple[GroupJob, int, Draw]] = {}  # requests that the engine is generating
        self._followed: dict[Row, int] = {}  # of those, and the tokens that were told
        self._actors = Actors(memory)
        self.wake = self._actors.wake  # by any thread: a step that waits for environments returns
        self.beat = self._actors.beat

    @property
    def decoding(self) -> int:
        """Groups that have rows."""
        return len(self._decoding)

    @property
    def requests(self) -> int:
        """Requests under way; the other rows are of siblings that wait at a barrier."""
        return len(self._open)

    @property
    def waiting(self) -> int:
        """Groups that wait for rows."""
        return len(self._waiting)

    def waiting_of(self, client: tuple[str, ...]) -> int:
        """Of those, the ones of clients whose names begin so."""
        return sum(job.client[: len(client)] == client for job in list(self._waiting))

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting or self._decoding or self._ended)

    def room(self, rows: int) -> bool:
        """Whether a group of so many rows would be admitted by the next step."""
        if not self._waiting and not self._decoding:
            return True
        return self._engine.free_rows() - sum(len(job.rollout.unfinished()) for job in self._waiting) >= rows

    def submit(
        self,
        prompt: Prompt,
        settings: GroupSettings,
        observe: Observer | None = None,
        *,
        client: tuple[str, ...] = (),
        follow: bool = False,
    ) -> GroupJob:
        """Queue a group; ``observe`` is told of each `Event`, of remembered candidates at once.

        ``follow``, for a plain group on a `ServingEngine`: it is also told of tokens as they are drawn (`Drawn`).
        """
        rows, tell = GroupRows(self._engine), observe or _ignore
        job = GroupJob(prompt, settings, GroupRollout(prompt, settings, tell), rows, tell, client, follow)
        job.version = settings.policy_version
        self._advance(job, job.rollout.start)
        if job.group is None and job.error is None:
            self._waiting.append(job)
        return job

    def step(self) -> list[GroupJob]:
        """Admit groups whose rows are free, let the engine complete something; return the groups that ended."""
        if not self._parking:
            self._admit()
        self._take_replies(wait=not self._ended and not self._open)
        if not self._ended and (self._open or (self._decoding and not self._actors.busy)):
            try:
                completed = self._serving.poll(FOLLOWED_STEPS) if self._followed else self._engine.poll()
                if self._followed:
                    self._tell_drawn(completed)
                delivered = self._delivered(completed)
            except NonFiniteLogits as error:
                self._fail(self._jobs_of(error.draw) or self._decoding, error)
            except Exception as error:
                self._fail(self._decoding, error)
            else:
                self._hand_on(delivered)
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, job: GroupJob) -> None:
        """Drop a group and give its rows back; `step` will not return it."""
        for jobs in (self._waiting, self._decoding, self._ended):
            if job in jobs:
                jobs.remove(job)
        self._release(job)

    def park(self) -> list[GroupJob]:
        """Finish the segments under way, begin none, and give back all rows; return the groups that ended with that.

        Then the engine is free. The next `step` runs what is committed through its weights of then."""
        self._parking, ended = True, []
        try:
            while self._open:
                ended += self.step()
        finally:
            self._parking = False
        for job in reversed(self._decoding):
            self._release_rows(job)
            self._waiting.appendleft(job)
        self._decoding.clear()
        return ended

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> list[GroupJob]:
        """Give the engine new weights between two segments of the groups under way; returns as `park`."""
        ended = self.park()
        self._engine.load_weights(weights, version)
        self.go_on(version)
        return ended

    def go_on(self, version: int) -> None:
        """After `park`: the engine has the weights of this version now."""
        for job in self._waiting:
            job.version = version

    def close(self) -> None:
        """Drop all groups and give their rows back, each even where another one's release fails."""
        jobs = [*self._waiting, *self._decoding, *self._ended]
        with contextlib.ExitStack() as cancelled:
            for job in jobs:
                cancelled.callback(self.cancel, job)

    def _admit(self) -> None:
        """Give rows to waiting groups, while all rows of the next fit. With none decoding it must fit."""
        while self._waiting:
            job, free = next_group(self._waiting, self._decoding), self._engine.free_rows()
            if free < len(job.rollout.unfinished()) and self._decoding:
                return
            self._waiting.remove(job)
            self._decoding.append(job)
            try:
                self._start(job, free)
            except Exception as error:  # such as memory that runs out
                self._end(job, error)

    def _start(self, job: GroupJob, free: int) -> None:
        siblings = job.rollout.unfinished()
        if free < len(siblings):
            raise UserError(
                f"a group needs {len(siblings)} rows of the KV cache (rollout.num_generations) and the engine has {free}: "
                "raise rollout.cache_rows or rollout.max_rows, or lower rollout.num_generations"
            )
        job.rows.take(job.prompt.ids, siblings)
        asked, job.asked = job.asked, []
        for order, draw in asked:
            self._extend(job, order, draw)

    def _tell_drawn(self, completed: list[tuple[Row, Candidate]]) -> None:
        """Tell the groups that are followed which tokens were drawn; what is complete they get as a candidate."""
        for row in self._followed.keys() - dict(completed):
            job, sibling, _ = self._open[row]
            ids, logprobs = self._serving.drawn(row, self._followed[row])
            self._followed[row] += len(ids)
            if ids:
                self._advance(job, partial(job.drawn, sibling, ids, logprobs))

    def _delivered(self, completed: list[tuple[Row, Candidate]]) -> list[Delivery]:
        """The completed candidates with the group, sibling and draw of each."""
        if not completed and not self._interruptible:
            raise RuntimeError(f"the engine completed nothing while {len(self._open)} rows wait for it")
        asked = [(self._closed(row), candidate) for row, candidate in completed]
        return [(job, sibling, draw, found.drawn_by(job.version)) for (job, sibling, draw), found in asked]

    def _hand_on(self, delivered: list[Delivery]) -> None:
        """Remember the candidates, all before any is judged, then give them to their groups."""
        if self._memory is not None:
            for _, _, draw, candidate in delivered:
                self._memory.add(draw, candidate)
            self._memory.flush()
        for job, sibling, _, candidate in delivered:
            if job.error is None:  # an earlier one of these may have failed the group
                self._advance(job, partial(job.rollout.deliver, sibling, candidate))

    def _take_replies(self, wait: bool) -> None:
        """Hand on what environments have answered; ``wait`` for an answer where there is nothing to decode."""
        for done, reply in self._actors.replies(wait):
            done(reply)

    def _advance(self, job: GroupJob, move: Callable[[], list[Order]]) -> None:
        """Move a group's state machine on and do what it asks for. What that raises ends this group; the others go on."""
        try:
            self._carry_out(job, move())
        except Exception as error:
            self._end(job, error)

    def _carry_out(self, job: GroupJob, orders: Iterable[Order]) -> None:
        """Carry out a group's orders, and those that follow where the memory has the candidate."""
        queue = deque(orders)
        while queue:
            order = queue.popleft()
            if isinstance(order, Release):
                job.rows.release(order.sibling)
                continue
            draw = None if isinstance(order, Undo) else job.settings.draw(job.prompt.problem.id, order)
            if isinstance(order, Act | Undo):
                done = partial(self._observe, job, order.sibling)
                self._actors.answer(job, job.prompt, job.episodes, order, draw, done)
                continue
            assert draw is not None
            known = None if self._memory is None else self._memory.take(draw)
            if (
                known is not None and (known.version or 0) <= job.version
            ):  # else of newer weights than the group has reached
                queue += job.rollout.deliver(order.sibling, known)
            elif job.rows.held and not self._parking:
                self._extend(job, order, draw)
            else:
                job.asked.append((order, draw))
        if job.rollout.finished:
            job.group = job.rollout.group(job.episodes)
            self._end(job, None)

    def _extend(self, job: GroupJob, order: Extend, draw: Draw) -> None:
        row = job.rows.extend(order, draw, job.settings, job.rollout.committed_ids)
        self._open[row] = (job, order.sibling, draw)
        if job.follow:
            self._followed[row] = 0

    def _closed(self, row: Row) -> tuple[GroupJob, int, Draw]:
        """What the row generated for, which it no longer does."""
        self._followed.pop(row, None)
        return self._open.pop(row)

    def _observe(self, job: GroupJob, sibling: int, reply: Reply) -> None:
        """A sibling's environment has answered its turn."""
        self._advance(job, partial(job.rollout.observe, sibling, reply))

    def _jobs_of(self, draw: Draw) -> list[GroupJob]:
        """The group that asked for a draw. Groups of several clients may have equal draws: the object tells them apart."""
        same = [job for job, _, asked in self._open.values() if asked is draw]
        return same or [job for job, _, asked in self._open.values() if asked == draw]

    def _fail(self, jobs: Iterable[GroupJob], error: Exception) -> None:
        for job in dict.fromkeys(jobs):
            self._end(job, error)

    def _end(self, job: GroupJob, error: Exception | None) -> None:
        job.error = error
        for jobs in (self._decoding, self._waiting):
            if job in jobs:
                jobs.remove(job)
        self._ended.append(job)
        try:
            self._release(job)
        except Exception as failed:  # a row that the engine can't give back is lost; the other groups go on
            job.error = job.error or failed

    def _release(self, job: GroupJob) -> None:
        """Give back the rows of a group that ended and stop waiting for its environments; those of a finished group stay."""
        self._actors.forget(job)
        with contextlib.ExitStack() as releases:
            releases.callback(self._release_rows, job)
            for episode in job.episodes.values() if job.group is None else ():
                releases.callback(episode.close)

    def _release_rows(self, job: GroupJob) -> None:
        for row in job.rows.held:
            if row in self._open:
                self._closed(row)
        job.rows.release_all()
