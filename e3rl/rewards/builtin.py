"""The built-in reward functions and the table of their names."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from e3rl.errors import UserError
from e3rl.rewards.adapters import RewardFunction, contained, wait_for_all
from e3rl.rewards.answers import Unboxed, last_box
from e3rl.rewards.batch import Batch, BatchReward, Part
from e3rl.rewards.grading import Grade, grade_all
from e3rl.rewards.pool import ProcessPool
from e3rl.types import Trajectory

REWARDS = {
    "math": "e3rl.rewards.builtin:MathReward",
    "format": "e3rl.rewards.builtin:format_reward",
    "overlong": "e3rl.rewards.builtin:overlong_reward",
    "code": "e3rl.environments.code:CodeReward",
    "judge": "e3rl.rewards.judge:JudgeReward",
    "reward_model": "e3rl.reward_model:SequenceReward",
    "environment": "e3rl.rewards.builtin:environment_reward",
    "lab": "e3rl.lab.reward:lab_reward",
}


class MathReward(BatchReward):
    """1 if the response's final answer equals the problem's, else 0; missing if the check takes too long.

    ``unboxed``: what counts as the answer without a box. ``cut_off_needs_box``: in a response that reached its length limit
    only the box counts.
    """

    def __init__(self, pool: ProcessPool, unboxed: Unboxed = "last", cut_off_needs_box: bool = False) -> None:
        super().__init__(pool)
        self._unboxed, self._cut_off_needs_box = unboxed, cut_off_needs_box

    def score(self, batch: Batch) -> list[Part]:
        golds = [problem.answer for problem in batch.problems]
        unboxed = [self._counts(trajectory) for trajectory in batch.trajectories]
        grades = grade_all(list(zip(golds, batch.texts, strict=True)), self.pool, unboxed=unboxed)
        return [self._part(gold, grade) for gold, grade in zip(golds, grades, strict=True)]

    def _counts(self, trajectory: Trajectory) -> Unboxed:
        return "none" if self._cut_off_needs_box and trajectory.finish == "length" else self._unboxed

    @staticmethod
    def _part(gold: str | None, grade: Grade) -> Part:
        if gold is None:
            return Part(error="the problem has no answer to compare with (data.answer_column)")
        return Part(error=grade.reason) if grade.correct is None else Part(float(grade.correct))


def completion_text(completion: str | Sequence[dict[str, str]]) -> str:
    """A completion's text, whether it came as a string or as chat messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def format_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    r"""1 if the last ``\boxed{…}`` of the response is closed and not empty, else 0."""
    return [float(last_box(completion_text(completion)) is not None) for completion in completions]


def environment_reward(environments: Sequence[Any], **columns: Any) -> list[Any]:
    """The value of ``get_reward()`` of each trajectory's environment, or what it raised; no opinion without such a method."""
    return [_asked(e) if hasattr(e, "get_reward") else None for e in environments]


def _asked(environment: Any) -> Any:
    try:
        with contained():
            found = environment.get_reward()
            return wait_for_all([found])[0] if inspect.isawaitable(found) else found
    except Exception as error:  # user code may raise anything; it costs this trajectory's reward alone
        return error


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """DAPO's soft overlong punishment: 0 up to ``limit - buffer`` tokens, falling linearly to -1 at ``limit``."""
    return -min(1.0, max(0, length - (limit - buffer)) / buffer)


def make_overlong_reward(buffer: int) -> RewardFunction:
    """An overlong reward with a buffer of your own, in tokens."""
    if buffer < 1:
        raise UserError(f"the overlong buffer must be at least 1 token, not {buffer}")

    def overlong(completion_ids: Sequence[Sequence[int]], max_completion_length: int) -> list[float]:
        return [overlong_penalty(len(ids), max_completion_length, buffer) for ids in completion_ids]

    return overlong


def overlong_reward(completion_ids: Sequence[Sequence[int]], max_completion_length: int) -> list[float]:
    """`overlong_penalty` with DAPO's proportions: the buffer is the last fifth of the limit."""
    buffer = max(1, max_completion_length // 5)
    return [overlong_penalty(len(ids), max_completion_length, buffer) for ids in completion_ids]
