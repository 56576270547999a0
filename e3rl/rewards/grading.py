"""Grades responses against references: right, wrong or undecided. Either text may contain more than its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from e3rl.rewards.answers import Unboxed
from e3rl.rewards.pool import Outcome, PooledCall, ProcessPool

LONGEST_RESPONSE = 2**21
"""Characters of a response that are read; of a longer one, only the end."""

CHECK_MEMORY = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Grade:
    """``correct`` is None if undecided; ``reason`` says why in a few words."""

    correct: bool | None
    reason: str


def grade_all(
    pairs: Sequence[tuple[str | None, str]], pool: ProcessPool, *, unboxed: Unboxed | Sequence[Unboxed] = "last"
) -> list[Grade]:
    """The grade of every (reference, response); ``unboxed`` for all, or for each.

    Each distinct pair is checked once, in a worker that can be killed; this process never parses a response.
    """
    modes = [unboxed] * len(pairs) if isinstance(unboxed, str) else unboxed
    items = [
        (gold, response[-LONGEST_RESPONSE:], mode) if gold is not None and gold.strip() else None
        for (gold, response), mode in zip(pairs, modes, strict=True)
    ]
    distinct = list(dict.fromkeys(item for item in items if item is not None))
    tasks = [
        PooledCall(
            "e3rl.rewards.math_check:check",
            {"gold": gold, "response": response, "unboxed": mode},
            CHECK_MEMORY,
        )
        for gold, response, mode in distinct
    ]
    outcomes = dict(zip(distinct, pool.map(tasks), strict=True)) if tasks else {}
    nothing = Grade(None, "there is no reference answer to compare with")
    return [nothing if item is None else _grade(outcomes[item]) for item in items]


def _grade(outcome: Outcome) -> Grade:
    if outcome.error is not None:
        return Grade(None, f"the check {outcome.error}")
    correct, reason = outcome.value
    return Grade(correct, reason)
