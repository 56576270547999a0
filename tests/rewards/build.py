"""Trajectories for reward tests, of which only what a reward function can see is real, and how they are scored."""

from __future__ import annotations

from typing import Any

from e3rl.config import RewardsConfig
from e3rl.rewards.scorer import Scorer
from e3rl.types import Candidate, Message, Problem, Prompt, Reward, Segment, Trajectory


def trajectory(
    prompt: str | tuple[Message, ...] = "question",
    answer: str | None = None,
    *,
    tokens: int = 3,
    id: str = "p",
    **columns: Any,
) -> Trajectory:
    zeros = (0.0,) * tokens
    candidate = Candidate(tuple(range(tokens)), zeros, zeros, zeros, (1.0,) * tokens, (1,) * tokens, ended=True)
    problem = Problem(id, prompt, answer, columns)
    return Trajectory(Prompt(problem, (1, 2)), 0, (Segment(0, candidate, None),), (), "stop")


TWO = [trajectory("q1", "1", tokens=2, id="a", level=3), trajectory("q2", "2", tokens=4, id="b", solution="two")]
TEXTS = ["one", "2"]
CHAT = trajectory((Message("system", "s"), Message("user", "u")), "2")


def score(
    *functions: Any,
    trajectories: list[Trajectory] = TWO,
    texts: list[str] = TEXTS,
    weights: tuple[float, ...] = (),
    **options: Any,
) -> list[Reward]:
    with Scorer(RewardsConfig(weights=weights), functions=functions, **options) as scorer:
        return scorer.score(trajectories, texts)


def named(*names: str, texts: list[str] = TEXTS, trajectories: list[Trajectory] = TWO, **settings: Any) -> list[Reward]:
    with Scorer(RewardsConfig(functions=names, **settings), max_completion_length=5) as scorer:
        return scorer.score(trajectories, texts)


def values(rewards: list[Reward]) -> list[float | None]:
    return [r.value for r in rewards]
