"""One graded response as a plain record. Evaluations compute figures from these, stream them to disk and read them back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from e3rl.rewards.answers import extract_answer, last_box
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.stats import redrawn_tokens
from e3rl.types import Group, Reward, Trajectory


@dataclass(frozen=True, slots=True)
class Sample:
    """A response and its grade. ``pred`` and ``gold`` are named as `e3rl grade` reads them.

    ``correct`` is None if the grade is missing, and ``reason`` says why. ``tokens`` counts the response's tokens,
    ``generated`` all tokens drawn for it, including erased ones. ``segments`` were drawn; ``calls`` of tools have results in the
    response, and ``failed_calls`` of them are errors.
    """

    problem: str
    mode: str  # "plain" or "erasable"
    round: int
    sample: int  # counted over all rounds
    gold: str | None
    pred: str
    answer: str | None
    correct: bool | None
    reason: str | None
    boxed: bool
    finish: str
    tokens: int
    generated: int
    erasures: int
    segments: int
    calls: int = 0  # not in the streams of earlier versions
    failed_calls: int = 0

    @staticmethod
    def of(row: dict[str, Any]) -> Sample:
        """The sample in a line of the stream; KeyError if a field is missing."""
        return Sample(**{f.name: row[f.name] for f in fields(Sample) if f.default is MISSING or f.name in row})


def graded(
    group: Group, scorer: Scorer, tokenizer: Any, *, mode: str, round: int = 0, first: int = 0
) -> tuple[Sample, ...]:
    """The samples of a finished group, graded by the first reward function; ``first`` is the number of the first sample."""
    texts = [tokenizer.decode(t.ids.tolist(), skip_special_tokens=True) for t in group.trajectories]
    rewards = scorer.score(group.trajectories, texts)
    return tuple(
        _sample(t, text, reward, mode, round, first + i, scorer)
        for i, (t, text, reward) in enumerate(zip(group.trajectories, texts, rewards, strict=True))
    )


def _sample(
    trajectory: Trajectory, text: str, reward: Reward, mode: str, round: int, number: int, scorer: Scorer
) -> Sample:
    problem = trajectory.prompt.problem
    calls = [call for s in trajectory.segments if s.observation is not None for call in s.observation.calls]
    return Sample(
        problem=problem.id,
        mode=mode,
        round=round,
        sample=number,
        gold=problem.answer,
        pred=text,
        answer=extract_answer(text, scorer.unboxed),
        correct=reward.right,
        reason=reward.error if reward.right is None else None,
        boxed=last_box(text) is not None,
        finish=trajectory.finish,
        tokens=trajectory.committed_tokens,
        generated=trajectory.committed_tokens + trajectory.erased_tokens + redrawn_tokens(trajectory),
        erasures=len(trajectory.erasures),
        segments=len(trajectory.drawn_segments),
        calls=len(calls),
        failed_calls=sum(call.failed for call in calls),
    )


def by_problem(samples: Sequence[Sample], problems: Sequence[str]) -> list[list[Sample]]:
    """The samples of each problem, in the order of ``problems`` and of their numbers."""
    table: dict[str, list[Sample]] = {problem: [] for problem in problems}
    for sample in samples:
        table[sample.problem].append(sample)
    return [sorted(row, key=lambda s: s.sample) for row in table.values()]
