"""The user's reward functions inside the killable workers: a hang or a crash costs one reward, never the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from e3rl.plugins import load
from e3rl.rewards.adapters import adapt
from e3rl.rewards.batch import Batch, Log, Part
from e3rl.rewards.pool import Outcome, Task, WorkerPool


def prepare(name: str) -> Callable[[Batch], dict[str, Any]]:
    """In the worker: the function that ``name`` stands for, taking a batch and returning plain values."""
    adapter = adapt(load("reward", name, {}))

    def score(batch: Batch) -> dict[str, Any]:
        log = Log()
        parts = [{"value": p.value, "error": p.error, "details": dict(p.details)} for p in adapter(batch, log)]
        return {"parts": parts, "metrics": log.metrics, "extras": log.extras}

    return score


class IsolatedFunction:
    """Calls a function by name in the workers, one trajectory at a time."""

    def __init__(self, name: str, pool: WorkerPool) -> None:
        self._name, self._pool = name, pool

    def __call__(self, batch: Batch, log: Log) -> list[Part]:
        target = f"{prepare.__module__}:{prepare.__name__}"
        tasks = [Task(target, {"batch": batch.only(i)}, setup=self._name) for i in range(len(batch))]
        outcomes = self._pool.map(tasks)
        return [self._part(i, outcome, log, len(batch)) for i, outcome in enumerate(outcomes)]

    def _part(self, index: int, outcome: Outcome, log: Log, count: int) -> Part:
        if outcome.error is not None:
            return Part(error=outcome.error)
        for name, values in outcome.value["metrics"].items():
            log.metrics.setdefault(name, []).extend(values)
        for column, values in outcome.value["extras"].items():
            log.extras.setdefault(column, [None] * count)[index] = values[0] if values else None
        return Part(**outcome.value["parts"][0])
