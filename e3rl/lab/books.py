"""Chains of additions and subtractions in which a tool returns each next operation.

``qxv47+5:`` is answered by calling ``book`` with ``52``; its result is the next operation, ``-8``, and so on; after the last
booking the answer is ``A:44``. The model can't undo a wrong booking. If the books are checked at the end, it is accepted like
a right one, and the mistake shows some calls later.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from random import Random
from typing import Any

from e3rl.lab.chain import apply_operation
from e3rl.lab.chain import grade as grade_answer
from e3rl.lab.family import Family, LabTask, Step
from e3rl.types import Problem

AT_ONCE, AT_THE_END = "at once", "at the end"
_LEVELS = {1: (3, AT_ONCE), 2: (5, AT_ONCE), 3: (3, AT_THE_END), 4: (5, AT_THE_END)}
_CALL = "<tool_call>book<arg_key>sum</arg_key><arg_value>{}</arg_value></tool_call>"
_SAID = re.compile(r"<arg_value>(.*?)</arg_value></tool_call>([+-]\d)?|A:.*$", re.DOTALL)
_NAME = 3  # letters that tell books apart
DONE, WRONG, CLOSED = "ok", "wrong", "closed"


class Books:
    """One problem's books: they return the next operation for each sum that is booked.

    Checked at once, a wrong sum is an error and closes them. Checked at the end, the last booking fails if any was wrong.
    """

    def reset(self, operations: Sequence[str], question: str, checked: str, **row: Any) -> None:
        """Open them at the question's sum, before its operation."""
        self._operations, self._at_once = tuple(operations), checked == AT_ONCE
        self._sum, self._booked, self._right, self._closed = int(question[_NAME:][:2]), 0, True, False

    def snapshot(self) -> tuple[int, int, bool, bool]:
        """Sum, bookings, whether all were right, whether they are closed."""
        return self._sum, self._booked, self._right, self._closed

    def restore(self, snapshot: tuple[int, int, bool, bool]) -> None:
        """Restore the state that `snapshot` returned."""
        self._sum, self._booked, self._right, self._closed = snapshot

    def book(self, sum: str) -> str:
        """Book the new sum and get the next operation.

        Args:
            sum: the sum after the operation, in two digits
        """
        if self._closed:
            raise ValueError(CLOSED)
        self._sum = apply_operation(self._sum, self._operations[self._booked])
        self._booked += 1
        self._right &= sum == f"{self._sum:02d}"
        last = self._booked == len(self._operations)
        self._closed = last or (self._at_once and not self._right)
        if self._closed and not self._right:
            raise ValueError(WRONG)
        return DONE if last else self._operations[self._booked]

    def get_reward(self) -> float:
        """1 if they are closed and every booking was right."""
        return float(self._closed and self._right)


def draw(level: int, rng: Random) -> LabTask:
    """Random books: a name, a start and as many operations as the level asks."""
    count, checked = _LEVELS[level]
    name = "".join(rng.choices(string.ascii_lowercase, k=_NAME))
    start, operations = rng.randrange(100), [rng.choice("+-") + str(rng.randrange(1, 10)) for _ in range(count)]
    sums = [start]
    for operation in operations:
        sums.append(apply_operation(sums[-1], operation))
    said = zip(sums[1:], [*operations[1:], DONE], strict=True)
    solution = "".join(_CALL.format(f"{value:02d}") + result for value, result in said)
    return LabTask(
        question=f"{name}{start:02d}{operations[0]}:",
        answer=f"{sums[-1]:02d}",
        solution=f"{solution}A:{sums[-1]:02d}",
        key=f"{name}{start:02d}{''.join(operations)}",
        columns={"operations": operations, "checked": checked},
    )


def conversation(problem: Problem) -> list[dict[str, Any]]:
    """A solved problem as chat messages with tool calls and their results."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": problem.prompt}]
    *calls, answer = _SAID.finditer(str(problem.columns["solution"]))
    for match in calls:
        function = {"name": "book", "arguments": {"sum": match[1]}}
        messages.append(
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        )
        messages.append({"role": "tool", "name": "book", "content": match[2] or DONE})
    return [*messages, {"role": "assistant", "content": answer[0]}]


def steps(question: str, answer: str, response: str) -> list[Step]:
    """The bookings and the answer line, each judged against the sum booked before it."""
    before, operation, found = int(question[_NAME:][:2]), question[_NAME + 2 :].rstrip(":") or None, list[Step]()
    for match in _SAID.finditer(response.rstrip()):
        value = match[1]
        if value is None:
            found.append(
                Step(match.start(), match.end(), match[0], operation is None and match[0] == f"A:{before:02d}")
            )
            continue
        right = operation is not None and value == f"{apply_operation(before, operation):02d}"
        found.append(Step(match.start(1), match.end(1), value, right))
        before, operation = int(value) if re.fullmatch(r"[0-9]{2}", value) else -1, match[2]
    return found


FAMILY = Family(
    name="books",
    levels={level: f"{count} bookings, checked {checked}" for level, (count, checked) in _LEVELS.items()},
    training_level=4,
    draw=draw,
    steps=steps,
    grade=grade_answer,
)
