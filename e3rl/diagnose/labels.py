"""Which segments of a response are wrong: by its first wrong step if the data allow it, else by its final answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from e3rl.errors import UserError
from e3rl.lab.problems import FAMILIES, first_error
from e3rl.types import Problem, Segment


def knows_steps(problems: Sequence[Problem]) -> bool:
    """Whether single steps can be judged: lab problems can."""
    return all(p.columns.get("family") in FAMILIES and "question" in p.columns for p in problems)


def segment_ends(segments: Sequence[Segment], tokenizer: Any) -> list[int]:
    """Characters of the response up to the end of each segment."""
    ends: list[int] = []
    known: list[int] = []
    for segment in segments:
        known += segment.candidate.ids.tolist()
        ends.append(len(tokenizer.decode(known, skip_special_tokens=True)))
    return ends


def wrong_by_steps(problem: Problem, text: str, ends: Sequence[int]) -> list[bool]:
    """One entry a segment up to and including the one where the first wrong step ends: what follows it can't be judged.

    A response without a wrong step that is wrong all the same (it stops too early) is wrong in its last segment.
    """
    error = first_error(problem, text)
    if error is None:
        return [False] * len(ends)
    where = next((n for n, end in enumerate(ends) if error.end <= end), len(ends) - 1)
    return [False] * where + [True]


def labels(problem: Problem, text: str, ends: Sequence[int], right: bool, by_steps: bool) -> list[bool]:
    """Whether each segment is wrong."""
    if not by_steps:
        return [not right] * len(ends)
    found = wrong_by_steps(problem, text, ends)
    if not right and not any(found) and found:
        found[-1] = True
    return found


def require_rewards(faults: Sequence[str | None]) -> None:
    """UserError if too few answers could be graded. ``faults``: why each could not, None if it could."""
    known = faults.count(None)
    if not faults or known < len(faults) / 2:
        why = next((f" ({fault})" for fault in faults if fault), "")
        raise UserError(
            f"only {known} of {len(faults)} responses could be graded{why}: check rewards.functions and data.answer_column"
        )
