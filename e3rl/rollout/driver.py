"""One driver of an engine: groups are submitted, stepped and cancelled. Batches, the server and rollout workers use the same one.

No request waits for another sibling's retry or for another group; the only wait is a group's barrier (`judge`). Nothing
here knows what a KV cache or an entropy is.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from e3rl.engine.protocol import Engine, Row
from e3rl.environments.protocol import Reply
from e3rl.errors import NonFiniteLogits, UserError
from e3rl.rollout.group import GroupRollout, GroupSettings
from e3rl.rollout.jobs import GroupJob
from e3rl.rollout.orders import Act, Event, Extend, Order, Release, Undo
from e3rl.rollout.turns import Actors, Memory
from e3rl.types import Candidate, Draw, Prompt

if TYPE_CHECKING:
    from torch import Tensor

Observer = Callable[[Event], None]


def _ignore(event: Event) -> None:
    """Nobody watches."""


Delivery = tuple[GroupJob, int, Draw, Candidate]
"""A candidate, its group and sibling, and the draw that names it."""


class Driver:
    """Decodes any number of groups on one engine, each by its own settings.

    A group's failure is its own: bad settings, a prompt that doesn't fit, non-finite logits. Where the engine fails, all
    groups that are decoding fail. What ``memory`` knows of a group is not generated again. Not thread-safe.
    """

    def __init__(self, engine: Engine, memory: Memory | None = None) -> None:
        self._engine, self._memory = engine, memory
        self._append = getattr(engine, "append", None)
        self._interruptible = hasattr(engine, "interrupt")  # then a poll may complete nothing
        self._waiting: deque[GroupJob] = deque()
        self._decoding: list[GroupJob] = []
        self._ended: list[GroupJob] = []  # and not yet returned by `step`
        self._parking = False  # no segment may begin
        self._open: dict[Row, tuple[GroupJob, int, Draw]] = {}  # requests that the engine is at
        self._actors = Actors(memory)

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

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting or self._decoding or self._ended)

    def room(self, rows: int) -> bool:
        """Whether a group of so many rows would be admitted by the next step."""
        if not self._waiting and not self._decoding:
            return True
        return self._engine.free_rows() - sum(_rows_needed(job) for job in self._waiting) >= rows

    def submit(self, prompt: Prompt, settings: GroupSettings, observe: Observer | None = None) -> GroupJob:
        """Queue a group; ``observe`` is told of each `Committed`, `Erased` and `Finished`, of remembered ones at once."""
        job = GroupJob(prompt, settings, version=settings.policy_version)
        try:
            settings.check()
            job.rollout = GroupRollout(prompt, settings, observe or _ignore)
            self._carry_out(job, job.rollout, job.rollout.start())
        except Exception as error:
            self._end(job, error)
        if job.group is None and job.error is None:
            self._waiting.append(job)
        return job

    def step(self) -> list[GroupJob]:
        """Admit groups whose rows are free, let the engine complete something; return the groups that ended."""
        self._admit()
        self._take_replies(wait=not self._ended and not self._open)
        if self._ended or not (self._open or (self._decoding and not self._actors.busy)):
            return self._take_ended()
        return self._poll()

    def _poll(self) -> list[GroupJob]:
        """Let the engine complete something and hand it on; the groups that ended."""
        try:
            delivered = self._delivered(self._engine.poll())
        except NonFiniteLogits as error:
            self._fail(self._jobs_of(error.draw) or self._decoding, error)
        except Exception as error:
            self._fail(self._decoding, error)
        else:
            self._hand_on(delivered)
        return self._take_ended()

    def _take_ended(self) -> list[GroupJob]:
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
                ended += self._poll()
        finally:
            self._parking = False
        for job in reversed(self._decoding):
            self._release_rows(job)
            self._waiting.appendleft(job)
        self._decoding.clear()
        return ended + self._take_ended()

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
        """Give rows to waiting groups in their order, while all rows of the next fit. With none decoding it must fit."""
        while self._waiting:
            job, free = self._waiting[0], self._engine.free_rows()
            if free < _rows_needed(job) and self._decoding:
                return
            self._decoding.append(self._waiting.popleft())
            try:
                self._start(job, free)
            except Exception as error:  # such as memory that runs out
                self._end(job, error)

    def _start(self, job: GroupJob, free: int) -> None:
        assert job.rollout is not None
        siblings = job.rollout.unfinished()
        if free < len(siblings):
            raise UserError(
                f"a group needs {len(siblings)} rows of the KV cache (rollout.num_generations) and the engine has {free}: "
                "raise rollout.cache_rows or rollout.max_rows, or lower rollout.num_generations"
            )
        job.rows = dict(zip(siblings, self._engine.prefill(job.prompt.ids, len(siblings)), strict=True))
        asked, job.asked = job.asked, []
        for order, draw in asked:
            self._extend(job, job.rollout, order, draw)

    def _delivered(self, completed: list[tuple[Row, Candidate]]) -> list[Delivery]:
        """Whose candidates these are."""
        if not completed and not self._interruptible:
            raise RuntimeError(f"the engine completed nothing while {len(self._open)} rows wait for it")
        asked = [(self._open.pop(row), candidate) for row, candidate in completed]
        return [(job, sibling, draw, found.drawn_by(job.version)) for (job, sibling, draw), found in asked]

    def _hand_on(self, delivered: list[Delivery]) -> None:
        """Remember the candidates, all before any is judged, then give them to their groups."""
        if self._memory is not None:
            for _, _, draw, candidate in delivered:
                self._memory.add(draw, candidate)
            self._memory.flush()
        for job, sibling, _, candidate in delivered:
            if job.error is None:  # an earlier one of these may have failed the group
                assert job.rollout is not None
                self._go_on(job, partial(job.rollout.deliver, sibling, candidate))

    def _go_on(self, job: GroupJob, advance: Callable[[], list[Order]]) -> None:
        assert job.rollout is not None
        try:
            self._carry_out(job, job.rollout, advance())
        except Exception as error:  # the other groups can go on
            self._end(job, error)

    def _take_replies(self, wait: bool) -> None:
        """Hand on what environments have answered; ``wait``: there is nothing to decode before one does."""
        for done, reply in self._actors.replies(wait):
            done(reply)

    def _act(self, job: GroupJob, order: Act, draw: Draw) -> None:
        """Have the sibling's environment answer its turn, beside the engine. What the memory knows of it counts."""

        def done(reply: Reply) -> None:
            job.acting.discard(token)
            assert job.rollout is not None
            self._go_on(job, partial(job.rollout.observe, order.sibling, reply))

        token = self._actors.answer(job.prompt, job.episodes, order.sibling, order.ids, draw, done)
        job.acting.add(token)

    def _carry_out(self, job: GroupJob, rollout: GroupRollout, orders: Iterable[Order]) -> None:
        """Do what a group asks for, and what follows from it where the memory knows the answer."""
        queue = deque(orders)
        while queue:
            order = queue.popleft()
            if isinstance(order, Release):
                if order.sibling in job.rows:
                    self._engine.release(job.rows.pop(order.sibling))
                continue
            if isinstance(order, Undo):
                job.episodes[order.sibling].undo()
                continue
            draw = job.settings.draw(job.prompt.problem.id, order)
            if isinstance(order, Act):
                self._act(job, order, draw)
                continue
            known = None if self._memory is None else self._memory.take(draw)
            if known is not None and (known.version or 0) <= job.version:  # else of weights that are still to come
                queue += rollout.deliver(order.sibling, known)
            elif job.rows and not self._parking:
                self._extend(job, rollout, order, draw)
            else:
                job.asked.append((order, draw))
        if rollout.finished:
            job.group = rollout.group(job.episodes)
            self._end(job, None)

    def _extend(self, job: GroupJob, rollout: GroupRollout, order: Extend, draw: Draw) -> None:
        sibling, engine = order.sibling, self._engine
        row, offset = job.rows[sibling], job.offsets.get(sibling, 0)
        held = engine.length(row) + offset
        if held > order.start:
            engine.rollback(row, order.start - offset)
        elif held < order.start:
            row = self._take_up(job, sibling, rollout.committed_ids(sibling), held)
        engine.extend(row, order.tokens, draw, job.settings.sampling, *job.settings.hooks[sibling : sibling + 1])
        self._open[row] = (job, sibling, draw)

    def _take_up(self, job: GroupJob, sibling: int, ids: list[int], held: int) -> Row:
        """Bring a row up to its sibling's committed ``ids``, of which it holds the first ``held``.

        On a CPU everything after is as if there had been no break, to the last bit, where the engine can ``append``. Any
        other engine gets prompt and tokens as one prompt.
        """
        row = job.rows[sibling]
        if self._append is not None:
            self._append(row, ids[held:])
            return row
        self._engine.release(job.rows.pop(sibling))
        [row] = self._engine.prefill([*job.prompt.ids, *ids], 1)
        job.rows[sibling], job.offsets[sibling] = row, len(ids)
        return row

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
        """Give back the rows of a group that ended, and stop waiting for its environments; those of a finished group stay."""
        for token in job.acting:
            self._actors.forget(token)
        with contextlib.ExitStack() as releases:
            releases.callback(self._release_rows, job)
            for episode in job.episodes.values() if job.group is None else ():
                releases.callback(episode.close)

    def _release_rows(self, job: GroupJob) -> None:
        """Give back what a group still holds, each row even where another one's release fails."""
        rows, job.rows = job.rows, {}
        job.offsets.clear()
        with contextlib.ExitStack() as releases:
            for row in rows.values():
                self._open.pop(row, None)
                releases.callback(self._engine.release, row)


def _rows_needed(job: GroupJob) -> int:
    return len(job.rollout.unfinished()) if job.rollout else 0
