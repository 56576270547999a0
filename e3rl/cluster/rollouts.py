"""Where a trainer's groups come from: its own engine, or workers elsewhere. Which it is changes no group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from safetensors.torch import save as save_safetensors

from e3rl.cluster import TOKEN_VARIABLE
from e3rl.cluster.client import server_place
from e3rl.cluster.messages import Assignment
from e3rl.cluster.pool import Place, Terms, WorkerPool
from e3rl.cluster.ray_workers import ray_places
from e3rl.config import Config
from e3rl.engine.protocol import Engine
from e3rl.engine.weights import architecture
from e3rl.models import Policy
from e3rl.rollout.scheduler import Scheduler
from e3rl.types import Group, Prompt


class Rollouts(Protocol):
    """Turns prompts into groups, as `Assignment` says."""

    def run(self, prompts: Sequence[Prompt], assignment: Assignment, tick: Callable[[], None]) -> Iterator[Group]:
        """Yield each group as it finishes. ``tick`` is called often and may raise to stop."""

    def load_weights(self, version: int) -> None:
        """The policy has changed, and this is its version now."""

    def close(self) -> None:
        """Let go of what is elsewhere."""


class LocalRollouts:
    """This process generates."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, prompts: Sequence[Prompt], assignment: Assignment, tick: Callable[[], None]) -> Iterator[Group]:
        """See `Rollouts.run`."""
        scheduler = Scheduler(
            self._engine,
            assignment.rollout,
            assignment.erasure,
            seed=assignment.seed,
            reference=assignment.reference,
            entropy_moments=assignment.entropy_moments,
            observe=lambda _: tick(),
        )
        yield from scheduler.run(prompts, assignment.step, assignment.policy_version)

    def load_weights(self, version: int) -> None:
        """See `Rollouts.load_weights`."""
        self._engine.load_weights({}, version)

    def close(self) -> None:
        """Nothing is elsewhere."""


class RemoteRollouts:
    """Workers generate; the local engine stays for evaluation and keeps up with the policy."""

    def __init__(self, pool: WorkerPool, policy: Policy, engine: Engine) -> None:
        self._pool, self._policy, self._engine = pool, policy, engine
        self._publish(0)

    def run(self, prompts: Sequence[Prompt], assignment: Assignment, tick: Callable[[], None]) -> Iterator[Group]:
        """See `Rollouts.run`."""
        return self._pool.run(prompts, assignment, tick)

    def load_weights(self, version: int) -> None:
        """See `Rollouts.load_weights`; only what training changes travels."""
        self._engine.load_weights({}, version)
        self._publish(version)

    def _publish(self, version: int) -> None:
        tensors = {name: p.detach().cpu().contiguous() for name, p in self._policy.trainable()}
        self._pool.load_weights(version, save_safetensors(tensors))

    def close(self) -> None:
        """Let the workers go."""
        self._pool.close()


def build_rollouts(
    config: Config, policy: Policy, engine: Engine, longest_prompt: int, note: Callable[[str], None]
) -> Rollouts:
    """What ``rollout.servers`` and ``rollout.workers`` ask for."""
    rollout = config.rollout
    places: list[Place] = []
    if rollout.servers:
        token = os.environ.get(TOKEN_VARIABLE)
        places = [server_place(address, token, rollout.worker_timeout) for address in rollout.servers]
    elif rollout.workers:
        places = ray_places(config, longest_prompt)
    if not places:
        return LocalRollouts(engine)
    terms = Terms(
        architecture=architecture(policy.model),
        vocabulary=policy.vocabulary,
        longest=longest_prompt + rollout.completion_limit,
        timeout=rollout.worker_timeout,
    )
    return RemoteRollouts(WorkerPool(places, terms, note), policy, engine)
