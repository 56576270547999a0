"""Sources of a trainer's groups: its own engine or remote workers. Groups do not depend on the choice."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from e3rl.cluster import TOKEN_VARIABLE
from e3rl.cluster.broadcast import Broadcaster
from e3rl.cluster.client import server_place
from e3rl.cluster.messages import group_of
from e3rl.cluster.pool import Terms, WorkerPool
from e3rl.cluster.ray_workers import ray_places
from e3rl.config import Config
from e3rl.engine.build import build_engine
from e3rl.engine.protocol import Engine
from e3rl.evaluate.evaluation import Draws
from e3rl.models import Policy
from e3rl.rollout.batches import run_jobs
from e3rl.rollout.driver import Driver
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.jobs import GroupJob
from e3rl.train.journal import Journal, StepJournal
from e3rl.types import Group, Prompt
from e3rl.weights.image import in_order
from e3rl.weights.model import architecture
from e3rl.weights.publish import Published, Publisher


class Rollouts(Protocol):
    """Turns prompts into groups. What the journal holds from an earlier process is not generated again."""

    def run(self, prompts: Sequence[Prompt], settings: GroupSettings, tick: Callable[[], None]) -> Iterator[Group]:
        """Yield each group as it finishes. ``tick`` is called often and may raise to stop."""

    def paused(self) -> AbstractContextManager[None]:
        """Inside the ``with`` block the weights may change and the local engine holds no row: rollouts under way in another
        thread rest between two segments."""

    def load_weights(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """The policy has changed, and this is its version now. While `paused`, or where nothing is under way.

        ``weights`` are what training changes, for workers elsewhere; each is looked up once, by all ranks in the same order.
        """

    def close(self) -> None:
        """Release remote workers."""


class Turns:
    """A lock for two kinds of threads: one holds it for long and gives way; visitors take it for a short time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken, self.visitors = False, 0

    @contextlib.contextmanager
    def stay(self) -> Iterator[None]:
        """Hold the lock; the holder calls `give_way` now and then."""
        self._take()
        try:
            yield
        finally:
            self._leave()

    @contextlib.contextmanager
    def visit(self) -> Iterator[None]:
        """Hold the lock for a short time, before any thread that wants to stay."""
        with self._changed:
            self.visitors += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._taken)
            self.visitors -= 1
            self._taken = True
        try:
            yield
        finally:
            self._leave()

    def give_way(self) -> None:
        """Let visitors have the lock, then take it again."""
        self._leave()
        self._take()

    def _take(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken and not self.visitors)
            self._taken = True

    def _leave(self) -> None:
        with self._changed:
            self._taken = False
            self._changed.notify_all()


class LocalRollouts:
    """Generates in this process; rank 0's journal keeps every candidate.

    Rollouts in another thread take new weights between two segments.
    """

    def __init__(self, engine: Engine, journal: Journal | None) -> None:
        self._engine, self._journal, self._version = engine, journal, 0
        self._turns = Turns()

    def run(self, prompts: Sequence[Prompt], settings: GroupSettings, tick: Callable[[], None]) -> Iterator[Group]:
        """See `Rollouts.run`."""
        with self._turns.stay():
            memory = self._journal.of(settings.step) if self._journal is not None else None
            settings = replace(settings, policy_version=self._version)
            wanted, rows = ((prompt, settings) for prompt in prompts), settings.rollout.num_generations
            for job in run_jobs(self._engine, wanted, rows, lambda _: tick(), memory, self._give_way):
                yield job.result()
            if hasattr(self._engine, "rest"):
                self._engine.rest()

    def _give_way(self, driver: Driver) -> list[GroupJob]:
        if not self._turns.visitors:
            return []
        ended = driver.park()
        self._turns.give_way()
        driver.go_on(self._version)
        return ended

    def paused(self) -> AbstractContextManager[None]:
        """See `Rollouts.paused`."""
        return self._turns.visit()

    def load_weights(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """See `Rollouts.load_weights`: the engine's model has them already."""
        self._engine.load_weights({}, version)
        self._version = version

    def close(self) -> None:
        """Nothing to release."""


class NoRollouts:
    """The source of ranks above 0 where workers generate: rank 0 asks them."""

    def __init__(self, policy: Policy) -> None:
        self._published = in_order(dict(policy.trainable()))

    def run(self, prompts: Sequence[Prompt], settings: GroupSettings, tick: Callable[[], None]) -> Iterator[Group]:
        """No groups: ``prompts`` is empty here."""
        assert not prompts
        return iter(())

    def paused(self) -> AbstractContextManager[None]:
        """See `Rollouts.paused`: nothing is under way."""
        return contextlib.nullcontext()

    def load_weights(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Nothing here generates; divided weights are brought together for the rank that publishes them."""
        deque((weights[name] for name in self._published), maxlen=0)

    def close(self) -> None:
        """Nothing to release."""


class RemoteRollouts:
    """Generates on remote workers, for training and evaluation; the journal, which training needs, keeps its groups."""

    def __init__(self, pool: WorkerPool, policy: Policy, journal: Journal | None) -> None:
        self._pool, self._policy, self._journal = pool, policy, journal
        self._publishers = [
            Publisher(),
            Publisher(),
        ]  # while groups are made by the first's weights, the next are the other's
        self._turns, self._asking = Turns(), threading.Lock()
        self._published: Published | None = None
        self._sent: Published | None = None  # what the workers were last told of

    def run(self, prompts: Sequence[Prompt], settings: GroupSettings, tick: Callable[[], None]) -> Iterator[Group]:
        """See `Rollouts.run`: first the groups that are known, then those that have to be made."""
        assert self._journal is not None
        with self._turns.stay():
            self._asking.acquire()
            try:
                journal, version = self._journal.of(settings.step), self._send()
            except BaseException:
                self._asking.release()
                raise
        try:
            yield from self._run(prompts, replace(settings, policy_version=version), tick, journal)
        finally:
            self._asking.release()

    def _run(
        self, prompts: Sequence[Prompt], settings: GroupSettings, tick: Callable[[], None], journal: StepJournal
    ) -> Iterator[Group]:
        missing = []
        for prompt in prompts:
            known = journal.groups.pop(prompt.problem.id, None)
            if known is None:
                missing.append(prompt)
            else:
                yield group_of(known, prompt, settings, self._policy.vocabulary)
        if missing:
            for group in self._pool.run(missing, settings, tick):
                journal.add_group(group)
                yield group

    def paused(self) -> AbstractContextManager[None]:
        """See `Rollouts.paused`. Groups at workers continue with the weights that they were begun with."""
        return self._turns.visit()

    def draw(self, wanted: Iterable[tuple[Prompt, GroupSettings]]) -> Iterator[tuple[int, Group]]:
        """Groups for an evaluation, each with its first sample; those of the same samples, which follow each other, together."""
        for _, jobs in itertools.groupby(wanted, lambda job: (job[1].first_sibling, job[1].rollout.num_generations)):
            prompts, settings = zip(*jobs, strict=True)
            with self._asking:  # after a step's groups that are under way, by weights of before
                asked = replace(settings[0], policy_version=self._send())
                for group in self._pool.run(prompts, asked, lambda: None):
                    yield asked.first_sibling, group

    def load_weights(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """See `Rollouts.load_weights`: written down now, and given to the workers before the next groups."""
        if self._asking.locked() and self._sent is self._published:
            self._publishers.reverse()
        self._published = self._publishers[0].publish(version, dict(self._policy.trainable()), weights)

    def checksum(self) -> str:
        """Names the latest weights."""
        assert self._published is not None
        return self._published.offer.checksum

    def _send(self) -> int:
        """Tell the workers of the latest weights; their version. Only between two runs: a worker that is replaced in one needs
        the weights that it was begun with."""
        assert self._published is not None
        if self._sent is not self._published:
            self._sent = self._published
            self._pool.load_weights(self._published)
        return self._published.version

    def close(self) -> None:
        """Release the workers."""
        self._pool.close()
        for publisher in self._publishers:
            publisher.close()


def remote_rollouts(
    config: Config, policy: Policy, longest_prompt: int, journal: Journal | None, note: Callable[[str], None]
) -> RemoteRollouts:
    """The workers that ``rollout.servers`` or ``rollout.workers`` ask for."""
    rollout = config.rollout
    if rollout.servers:
        token = os.environ.get(TOKEN_VARIABLE)
        places = [server_place(address, token, rollout.worker_timeout) for address in rollout.servers]
    else:
        places = ray_places(config, longest_prompt)
    terms = Terms(
        architecture=architecture(policy.model),
        vocabulary=policy.vocabulary,
        longest=longest_prompt + rollout.completion_limit,
        timeout=rollout.worker_timeout,
    )
    broadcaster = Broadcaster(note, cuda=policy.device.type == "cuda" and rollout.worker_gpus > 0)
    return RemoteRollouts(WorkerPool(places, terms, note, broadcaster), policy, journal)


def generates_elsewhere(config: Config) -> bool:
    """Whether a run's settings name processes on other devices, which an evaluation after it can be spread over."""
    return bool(config.rollout.servers or config.rollout.workers or config.train.workers)


@contextlib.contextmanager
def evaluation_draws(config: Config, policy: Policy, longest_prompt: int) -> Iterator[Engine | Draws]:
    """What an evaluation beside a training draws by: an engine in this process, the run's servers, or as many workers as the run
    has devices, those that trained included."""
    rollout, train = config.rollout, config.train
    if not generates_elsewhere(config):
        yield build_engine(rollout, policy.model, policy.eos_ids, longest_prompt)
        return
    if not rollout.servers:
        gpus = rollout.worker_gpus if rollout.workers else train.worker_gpus
        rollout = replace(rollout, workers=rollout.workers + train.workers, worker_gpus=gpus)
    found = remote_rollouts(replace(config, rollout=rollout), policy, longest_prompt, None, print)
    try:
        found.load_weights(0, dict(policy.trainable()))
        yield found.draw
    finally:
        found.close()
