"""Where a trainer's groups come from: its own engine, or workers elsewhere. Which it is changes no group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from e3rl.cluster import TOKEN_VARIABLE
from e3rl.cluster.client import server_place
from e3rl.cluster.messages import group_of
from e3rl.cluster.pool import Place, Terms, WorkerPool
from e3rl.cluster.ray_workers import ray_places
from e3rl.cluster.weights import Publisher
from e3rl.config import Config
from e3rl.engine.protocol import Engine
from e3rl.engine.weights import architecture
from e3rl.models import Policy
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.train.journal import Journal
from e3rl.types import Group, Prompt


class Rollouts(Protocol):
    """Turns prompts into groups. What the journal holds of them, of an earlier process, is not generated again."""

    def run(self, prompts: Sequence[Prompt], settings: GroupSettings, tick: Callable[[], None]) -> Iterator[Group]:
        """Yield each group as it finishes. ``tick`` is called often and may raise to stop."""

    def load_weights(self, version: int) -> None:
        """The policy has changed, and this is its version now."""

    def close(self) -> None:
        """Let go of what is elsewhere."""


class LocalRollouts:
    """This process generates; the journal, which the first rank has, keeps every candidate."""

    def __init__(self, engine: Engine, journal: Journal | None) -> None:
        self._engine, self._journal = engine, journal

    def run(self, prompts: Sequence[Prompt], settings: GroupSettings, tick: Callable[[], None]) -> Iterator[Group]:
        """See `Rollouts.run`."""
        memory = self._journal.of(settings.step) if self._journal is not None else None
        return run_groups(self._engine, prompts, settings, observe=lambda _: tick(), memory=memory)

    def load_weights(self, version: int) -> None:
        """See `Rollouts.load_weights`."""
        self._engine.load_weights({}, version)

    def close(self) -> None:
        """Nothing is elsewhere."""


class RemoteRollouts:
    """Workers generate; the journal keeps every group. The local engine stays for evaluation and keeps up with the policy."""

    def __init__(self, pool: WorkerPool, policy: Policy, engine: Engine, journal: Journal) -> None:
        self._pool, self._policy, self._engine, self._journal = pool, policy, engine, journal
        self._publisher = Publisher()
        self._publish(0)

    def run(self, prompts: Sequence[Prompt], settings: GroupSettings, tick: Callable[[], None]) -> Iterator[Group]:
        """See `Rollouts.run`: first the groups that are known, then those that have to be made."""
        journal, missing = self._journal.of(settings.step), []
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

    def load_weights(self, version: int) -> None:
        """See `Rollouts.load_weights`; only what training changes travels."""
        self._engine.load_weights({}, version)
        self._publish(version)

    def _publish(self, version: int) -> None:
        weights = dict(self._policy.trainable())
        self._pool.load_weights(self._publisher.publish(version, weights, weights))

    def close(self) -> None:
        """Let the workers go."""
        self._pool.close()
        self._publisher.close()


def build_rollouts(
    config: Config,
    policy: Policy,
    engine: Engine,
    longest_prompt: int,
    journal: Journal | None,
    note: Callable[[str], None],
) -> Rollouts:
    """What ``rollout.servers`` and ``rollout.workers`` ask for."""
    rollout = config.rollout
    places: list[Place] = []
    if rollout.servers:
        token = os.environ.get(TOKEN_VARIABLE)
        places = [server_place(address, token, rollout.worker_timeout) for address in rollout.servers]
    elif rollout.workers:
        places = ray_places(config, longest_prompt)
    if not places or journal is None:
        return LocalRollouts(engine, journal)
    terms = Terms(
        architecture=architecture(policy.model),
        vocabulary=policy.vocabulary,
        longest=longest_prompt + rollout.completion_limit,
        timeout=rollout.worker_timeout,
    )
    return RemoteRollouts(WorkerPool(places, terms, note), policy, engine, journal)
