"""The built-in reward functions and the table of their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from e3rl.errors import UserError
from e3rl.rewards.adapters import RewardFunction
from e3rl.rewards.answers import extract_answer, last_box, textual_verdict, without_count_noun
from e3rl.rewards.batch import Batch, BatchReward, Part
from e3rl.rewards.pool import Task

REWARDS = {
    "math": "e3rl.rewards.builtin:MathReward",
    "format": "e3rl.rewards.builtin:format_reward",
    "overlong": "e3rl.rewards.builtin:overlong_reward",
    "lab": "e3rl.lab.reward:lab_reward",
}

LONGEST_ANSWER = 2000
"""Characters beyond which an answer is wrong without a look: no reference answer comes near, hanging inputs do."""

_CHECK_MEMORY = 2 * 2**30


class MathReward(BatchReward):
    """1 if the response's final answer equals the problem's, else 0; missing where the check takes too long."""

    def score(self, batch: Batch) -> list[Part]:
        golds = [p.answer and without_count_noun(p.answer) for p in batch.problems]
        pairs = [(gold, extract_answer(text)) for gold, text in zip(golds, batch.texts, strict=True)]
        parts = [self._without_algebra(gold, answer) for gold, answer in pairs]
        hard = list(dict.fromkeys(pair for pair, part in zip(pairs, parts, strict=True) if part is None))
        tasks = [
            Task("e3rl.rewards.math_check:equivalent", {"gold": gold, "answer": answer}, _CHECK_MEMORY)
            for gold, answer in hard
        ]
        checked = dict(zip(hard, self.pool.map(tasks), strict=True))
        return [
            part or Part(None if checked[pair].error else float(checked[pair].value), checked[pair].error)
            for pair, part in zip(pairs, parts, strict=True)
        ]

    @staticmethod
    def _without_algebra(gold: str | None, answer: str | None) -> Part | None:
        if gold is None:
            return Part(error="the problem has no answer to compare with (data.answer_column)")
        if answer is None:
            return Part(0.0)
        verdict = textual_verdict(gold, answer)
        if verdict is None and len(answer) > LONGEST_ANSWER:
            return Part(0.0)
        return None if verdict is None else Part(float(verdict))


def completion_text(completion: str | Sequence[dict[str, str]]) -> str:
    """A completion's text, whether it came as a string or as chat messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def format_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    r"""1 if the last ``\boxed{…}`` of the response is closed and not empty, else 0."""
    return [float(last_box(completion_text(completion)) is not None) for completion in completions]


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
