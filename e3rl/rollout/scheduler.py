"""Rolls out many groups at once: keeps the engine's rows full and carries candidates and orders to and fro.

No request waits for another sibling's retry or for another group; the only wait is a group's barrier (`judge`). Nothing
here knows what a KV cache or an entropy is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from e3rl.config import ErasureConfig, RolloutConfig
from e3rl.engine.protocol import Engine, Row, Sampling
from e3rl.errors import UserError
from e3rl.rollout.group import Committed, Erased, Event, Extend, Finished, GroupRollout, Order
from e3rl.rollout.judge import GroupJudge, needs_reference, require_reference
from e3rl.rollout.moments import Moments
from e3rl.rollout.statistics import ReferenceStatistics, measured_by
from e3rl.rollout.stats import RolloutStats, summarise
from e3rl.types import Draw, Group, Prompt

__all__ = ["Committed", "Erased", "Event", "Finished", "RolloutStats", "Scheduler", "summarise"]


def _ignore(event: Event) -> None:
    """Nobody watches."""


class Scheduler:
    """Turns prompts into groups of finished trajectories.

    ``reference`` is needed where thresholds can't come from the group (see `require_reference`); ``entropy_moments`` of
    the previous batch serve D3's 'batch'; ``observe`` is told of each `Committed`, `Erased` and `Finished` at once.
    ``first_sibling`` is the number under which a group's first sibling draws: many samples of a prompt, divided into several
    small groups, then draw as those of one large group would.
    """

    def __init__(
        self,
        engine: Engine,
        rollout: RolloutConfig,
        erasure: ErasureConfig,
        *,
        seed: int,
        reference: ReferenceStatistics | None = None,
        entropy_moments: Moments | None = None,
        observe: Callable[[Event], None] | None = None,
        first_sibling: int = 0,
    ) -> None:
        if rollout.erase:
            require_reference(rollout.num_generations, erasure, reference)
            if reference is not None and needs_reference(rollout.num_generations, erasure):
                reference.check(measured_by(rollout, erasure))
        self.engine = engine
        self.rollout = rollout
        self.erasure = erasure
        self.seed = seed
        self.reference = reference
        self.entropy_moments = entropy_moments
        self.observe = observe or _ignore
        self.first_sibling = first_sibling
        self.sampling = Sampling(
            rollout.temperature, rollout.top_p, rollout.top_k, erasure.entropy_distribution, erasure.entropy_temperature
        )

    def run(self, prompts: Iterable[Prompt], step: int, policy_version: int) -> Iterator[Group]:
        """Yield each prompt's group as it finishes; prompts are taken as rows become free.

        Every row is released when the iterator ends, whether exhausted, closed early or stopped by an error.
        """
        return _Run(self, prompts, step, policy_version).groups()

    def group_rollout(self, prompt: Prompt) -> GroupRollout:
        """A new group of this scheduler's settings."""
        judge = None
        if self.rollout.erase:
            judge = GroupJudge(
                self.rollout.num_generations,
                self.erasure,
                reference=self.reference,
                entropy_moments=self.entropy_moments,
            )
        return GroupRollout(prompt, self.rollout, judge, self.erasure.on_exhausted, self.observe)


@dataclass(frozen=True, eq=False, slots=True)
class _Flight:
    """A group in the engine, and the row of each sibling."""

    rollout: GroupRollout
    rows: Sequence[Row]


class _Run:
    """One call of `Scheduler.run`."""

    def __init__(self, scheduler: Scheduler, prompts: Iterable[Prompt], step: int, policy_version: int) -> None:
        self._scheduler = scheduler
        self._engine = scheduler.engine
        self._prompts = iter(prompts)
        self._step = step
        self._policy_version = policy_version
        self._places: dict[Row, tuple[_Flight, int]] = {}  # rows held, and whose they are
        self._seen: set[str] = set()

    def groups(self) -> Iterator[Group]:
        try:
            self._admit()
            while self._places:
                finished = self._advance()
                self._admit()
                yield from finished
        finally:
            self._release_all()

    def _admit(self) -> None:
        """Start groups while all of their rows fit. With nothing in flight a group must fit."""
        siblings = self._scheduler.rollout.num_generations
        while not self._places or self._engine.free_rows() >= siblings:
            prompt = next(self._prompts, None)
            if prompt is None:
                return
            self._check(prompt)
            rows = self._engine.prefill(prompt.ids, siblings)
            flight = _Flight(self._scheduler.group_rollout(prompt), rows)
            self._places |= {row: (flight, sibling) for sibling, row in enumerate(rows)}
            self._execute(flight, flight.rollout.start())

    def _check(self, prompt: Prompt) -> None:
        free, siblings = self._engine.free_rows(), self._scheduler.rollout.num_generations
        if free < siblings:
            raise UserError(
                f"a group needs {siblings} rows of the KV cache (rollout.num_generations) and the engine has {free}: "
                "raise rollout.cache_rows or rollout.max_rows, or lower rollout.num_generations"
            )
        if prompt.problem.id in self._seen:
            raise UserError(
                f"problem id '{prompt.problem.id}' occurs twice in one batch of rollouts: both groups would get "
                "the same random draws and be identical. Give every problem its own id (data.id_column)"
            )
        self._seen.add(prompt.problem.id)

    def _advance(self) -> list[Group]:
        """Let the engine complete something; return the groups that this finishes."""
        completed = self._engine.poll()
        if not completed:
            raise RuntimeError(f"the engine completed nothing while {len(self._places)} rows wait for it")
        finished = []
        for row, candidate in completed:
            flight, sibling = self._places[row]
            self._execute(flight, flight.rollout.deliver(sibling, candidate))
            if flight.rollout.finished:
                group = flight.rollout.group(self._policy_version)
                self._scheduler.observe(Finished(group))
                finished.append(group)
        return finished

    def _execute(self, flight: _Flight, orders: Iterable[Order]) -> None:
        for order in orders:
            row = flight.rows[order.sibling]
            if isinstance(order, Extend):
                self._extend(row, order, flight.rollout.prompt.problem.id)
            else:
                del self._places[row]
                self._engine.release(row)

    def _extend(self, row: Row, order: Extend, prompt_id: str) -> None:
        if self._engine.length(row) > order.start:
            self._engine.rollback(row, order.start)
        sibling = self._scheduler.first_sibling + order.sibling
        draw = Draw(self._scheduler.seed, self._step, prompt_id, sibling, order.segment, order.attempt)
        self._engine.extend(row, order.tokens, draw, self._scheduler.sampling)

    def _release_all(self) -> None:
        """Release what is still held, each row even where another one's release fails."""
        with contextlib.ExitStack() as releases:
            for row in self._places:
                releases.callback(self._engine.release, row)
            self._places = {}
