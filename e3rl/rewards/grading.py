"""Grading: a reference and a response, either with its answer somewhere in it, become true, false or not to be said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from e3rl.rewards.answers import Unboxed
from e3rl.rewards.pool import Outcome, Task, WorkerPool

LONGEST_RESPONSE = 2**21
"""Characters of a response beyond which only its end is read."""

CHECK_MEMORY = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Grade:
    """``correct`` is None where nothing can be said, and ``reason`` tells why in a few words."""

    correct: bool | None
    reason: str


def grade_all(pairs: Sequence[tuple[str | None, str]], pool: WorkerPool, *, unboxed: Unboxed = "last") -> list[Grade]:
    """The grade of every (reference, response). Each distinct pair is looked at once, in the killable workers: nothing
    of a response is read in this process."""
    distinct = list(dict.fromkeys((g, r) for g, r in pairs if g is not None and g.strip()))
    tasks = [
        Task(
            "e3rl.rewards.math_check:check",
            {"gold": gold, "response": response[-LONGEST_RESPONSE:], "unboxed": unboxed},
            CHECK_MEMORY,
        )
        for gold, response in distinct
    ]
    outcomes = dict(zip(distinct, pool.map(tasks), strict=True)) if tasks else {}
    nothing = Grade(None, "there is no reference answer to compare with")
    return [_grade(outcomes[g, r]) if g is not None and g.strip() else nothing for g, r in pairs]


def _grade(outcome: Outcome) -> Grade:
    if outcome.error is not None:
        return Grade(None, f"the check {outcome.error}")
    correct, reason = outcome.value
    return Grade(correct, reason)
