"""Trajectories for reward tests: only what a reward function can see is real."""

from __future__ import annotations

from typing import Any

from e3rl.types import Candidate, Message, Problem, Prompt, Segment, Trajectory


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
