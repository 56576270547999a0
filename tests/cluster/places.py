"""Workers for tests: real ones in this process, and ones that fail in a chosen way around a real one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import save
from torch import Tensor

from e3rl.cluster.pool import Place, Terms, WorkerLost, WorkerPool
from e3rl.cluster.worker import RolloutWorker
from e3rl.config import Config
from e3rl.data.loading import load_problems
from e3rl.data.prompts import render_prompts
from e3rl.engine.build import build_engine
from e3rl.models import Policy, load_policy
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.types import Group, Prompt
from e3rl.weights.model import architecture
from e3rl.weights.publish import Published, Publisher

LONGEST_PROMPT = 40
SETTINGS = (
    "data.train_limit=5",
    "rollout.num_generations=3",
    "rollout.cache_rows=9",
    "rollout.max_rows=6",
    "rollout.max_segments=2",
    "erasure.kappa0=0.8",
)


@dataclass
class World:
    """A run without a trainer: its policy, its prompts and what to ask for."""

    config: Config
    policy: Policy
    prompts: list[Prompt]
    workers: list[RolloutWorker] = field(default_factory=list)
    publisher: Publisher = field(default_factory=Publisher)

    @classmethod
    def of(cls, config: Config) -> World:
        policy = load_policy(config.model)
        limits = {"context_limit": policy.context_length, "completion_limit": config.rollout.completion_limit}
        problems = load_problems(config.data.train, config=config.data, split="train")
        return cls(config, policy, render_prompts(problems, policy.tokenizer, config.data, **limits))

    @property
    def settings(self) -> GroupSettings:
        return GroupSettings(self.config.rollout, self.config.erasure, seed=5, step=1, policy_version=0)

    @property
    def weights(self) -> bytes:
        return save({name: p.detach().contiguous() for name, p in self.policy.trainable()})

    def terms(self, **settings: Any) -> Terms:
        longest = LONGEST_PROMPT + self.config.rollout.completion_limit
        size = self.policy.model.get_input_embeddings().weight.shape[0]
        return Terms(
            **{
                "architecture": architecture(self.policy.model),
                "vocabulary": size,
                "longest": longest,
                "timeout": 20.0,
                "poll": 0.05,
                **settings,
            }
        )

    def worker(self) -> RolloutWorker:
        worker = RolloutWorker(self.config, LONGEST_PROMPT)
        self.workers.append(worker)
        return worker

    def pool(self, *places: Place, **settings: Any) -> WorkerPool:
        pool = WorkerPool(places, self.terms(**settings))
        pool.load_weights(self.published())
        return pool

    def published(self, version: int = 0, weights: Mapping[str, Tensor] | None = None) -> Published:
        """These weights, or the policy's as they are now."""
        weights = weights or dict(self.policy.trainable())
        return self.publisher.publish(version, weights, weights)

    def local(self) -> list[Group]:
        """What this process generates: what every other way must give."""
        engine = build_engine(self.config.rollout, self.policy.model, self.policy.eos_ids, LONGEST_PROMPT)
        return self.sorted(run_groups(engine, self.prompts, self.settings))

    def run(self, pool: WorkerPool, tick: Callable[[], None] = lambda: None) -> list[Group]:
        groups = list(pool.run(self.prompts, self.settings, tick))
        assert len(groups) == len(self.prompts)
        return self.sorted(groups)

    def sorted(self, groups: Any) -> list[Group]:
        order = {prompt.problem.id: i for i, prompt in enumerate(self.prompts)}
        return sorted(groups, key=lambda g: order[g.prompt.problem.id])


def ids(groups: list[Group]) -> list[Any]:
    """All tokens, committed and erased, and the verdicts."""
    return [
        (
            t.sibling,
            t.ids.tolist(),
            t.segment_lengths,
            t.finish,
            [(e.start, e.candidate.ids.tolist(), e.judgement.attempt) for e in t.erasures],
        )
        for g in groups
        for t in g.trajectories
    ]


class Broken:
    """A connection whose ``exchange`` goes through ``change`` first: the n-th call, and what the worker would answer."""

    def __init__(self, worker: RolloutWorker, change: Callable[[int, Callable[[], bytes]], bytes]) -> None:
        self._worker, self._change, self._calls = worker, change, 0
        self.hello, self.load_weights, self.take_weights = worker.hello, worker.load_weights, worker.take_weights

    def exchange(self, body: bytes) -> bytes:
        self._calls += 1
        return self._change(self._calls, lambda: self._worker.exchange(body))

    def close(self) -> None:
        """The worker outlives its connections."""


def lost_once(call: int) -> Callable[[int, Callable[[], bytes]], bytes]:
    """A worker that dies at its n-th answer; the one that takes its place lives."""
    done: list[int] = []

    def change(number: int, answer: Callable[[], bytes]) -> bytes:
        if number == call and not done:
            done.append(number)
            raise WorkerLost("killed in the middle of a segment")
        return answer()

    return change
