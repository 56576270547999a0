"""The inputs and results of reward functions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from e3rl.types import Problem, Trajectory

if TYPE_CHECKING:
    from e3rl.rewards.pool import ProcessPool

ChatMessage = dict[str, str]


@dataclass(frozen=True, slots=True)
class Part:
    """One function's result for one trajectory: a number, no opinion (both None), or an error.

    ``details`` are further numbers that the function reports beside its value.
    """

    value: float | None = None
    error: str | None = None
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrainerState:
    """Training progress, for reward functions that ask for ``trainer_state``; field names as in transformers."""

    global_step: int = 0
    max_steps: int = 0


@dataclass(frozen=True)
class Batch:
    """Trajectories with their decoded texts, in the forms that reward functions expect."""

    trajectories: tuple[Trajectory, ...]
    texts: tuple[str, ...]
    max_completion_length: int | None = None
    trainer_state: TrainerState = field(default_factory=TrainerState)

    def __len__(self) -> int:
        return len(self.trajectories)

    def only(self, index: int) -> Batch:
        """The batch of one trajectory."""
        one = slice(index, index + 1)
        return Batch(self.trajectories[one], self.texts[one], self.max_completion_length, self.trainer_state)

    @cached_property
    def problems(self) -> list[Problem]:
        return [t.prompt.problem for t in self.trajectories]

    @cached_property
    def prompts(self) -> list[str | list[ChatMessage]]:
        """Strings, or lists of messages for chat prompts."""
        return [
            p.prompt if isinstance(p.prompt, str) else [{"role": m.role, "content": m.content} for m in p.prompt]
            for p in self.problems
        ]

    @cached_property
    def completions(self) -> list[str | list[ChatMessage]]:
        """Strings, or one assistant message for chat prompts."""
        pairs = zip(self.problems, self.texts, strict=True)
        return [t if isinstance(p.prompt, str) else [{"role": "assistant", "content": t}] for p, t in pairs]

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """``answer``, ``id`` and every column of the data, as one list each; None if a problem lacks a column."""
        names = dict.fromkeys(name for p in self.problems for name in p.columns)
        columns = {name: [p.columns.get(name) for p in self.problems] for name in names}
        return {"id": [p.id for p in self.problems], **columns, "answer": [p.answer for p in self.problems]}


@dataclass
class Log:
    """Collects what reward functions report through ``log_metric`` and ``log_extra`` while a batch is scored."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """Keep a number; a name logged more than once is averaged."""
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Keep a column: one value for each trajectory of the batch."""
        self.extras[column] = list(values)


class BatchReward(ABC):
    """A reward function in e3rl's own form: it sees whole trajectories and may use the killable workers."""

    def __init__(self, pool: ProcessPool) -> None:
        self.pool = pool

    @abstractmethod
    def score(self, batch: Batch) -> list[Part]:
        """One part for each trajectory, in order."""
