"""Small rewarded groups with made-up numbers, for tests of what happens after the rollout."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from e3rl.types import (
    Candidate,
    Erasure,
    Group,
    Judgement,
    Problem,
    Prompt,
    Reward,
    RewardedGroup,
    Segment,
    Threshold,
    Trajectory,
    Uncertainty,
    Verdict,
)
from tests.engine.models import VOCAB


def candidate(rng: Random, size: int, ended: bool = False) -> Candidate:
    def numbers(low: float, high: float) -> tuple[float, ...]:
        return tuple(rng.uniform(low, high) for _ in range(size))

    ids = tuple(rng.randrange(2, VOCAB) for _ in range(size))
    return Candidate(ids, numbers(-3, 0), numbers(0, 2), numbers(0, 1), (1.0,) * size, (1,) * size, ended)


def judgement(verdict: Verdict, attempt: int, u: float = 1.0, theta: float = 2.0) -> Judgement:
    return Judgement(Uncertainty(u, u, 0.0, 0.0, 0.0, u), Threshold(theta, theta, 1.0, 1.0), attempt, verdict)


def trajectory(prompt: Prompt, sibling: int, sizes: Sequence[int], erased: Sequence[int], rng: Random) -> Trajectory:
    """Segments of the given sizes; ``erased`` names segments that were erased once before they were committed."""
    segments, erasures, start = [], [], 0
    for index, size in enumerate(sizes):
        if index in erased:
            erasures.append(Erasure(index, start, candidate(rng, size), judgement(Verdict.ERASE, 0, u=3.0)))
        accepted = judgement(Verdict.COMMIT, int(index in erased))
        segments.append(Segment(index, candidate(rng, size, index == len(sizes) - 1), accepted))
        start += size
    return Trajectory(prompt, sibling, tuple(segments), tuple(erasures), "stop")


def rewarded_group(
    name: str, rewards: Sequence[float | None], sizes: Sequence[Sequence[int]], erased: Sequence[Sequence[int]] = ()
) -> RewardedGroup:
    """A group whose siblings have segments of these sizes and these rewards (None: missing)."""
    rng = Random(name)
    prompt = Prompt(Problem(name, name, "1"), tuple(rng.randrange(2, VOCAB) for _ in range(3 + len(name))))
    erased = erased or [[] for _ in sizes]
    siblings = tuple(trajectory(prompt, i, s, e, rng) for i, (s, e) in enumerate(zip(sizes, erased, strict=True)))
    found = tuple(Reward(r, {"f": r}, None if r is not None else "failed") for r in rewards)
    return RewardedGroup(Group(prompt, siblings, 0), found)
