"""Chains of additions and subtractions modulo 100, answered one operation at a time.

``47+5-8:`` is answered ``47+5=52;52-8=44;A:44``. Numbers always have two digits and operands one, so a wrong result
looks exactly like a right one and only spoils what follows.
"""

from __future__ import annotations

import re
from random import Random

from e3rl.lab.family import Family, LabTask, Step

_OPERATIONS = {1: 2, 2: 3, 3: 5, 4: 7, 5: 9, 6: 12}
_EQUATION = re.compile(r"(\d\d)([+-])(\d)=(\d\d)")
_ANSWER = re.compile(r"A:(\d+)\s*$")


def apply_operation(value: int, operation: str) -> int:
    """The sum modulo 100 after ``operation``, a sign and a digit."""
    return (value + int(operation)) % 100


def _parse(question: str) -> tuple[int, list[str]]:
    return int(question[:2]), re.findall(r"[+-]\d", question[2:])


def draw(level: int, rng: Random) -> LabTask:
    """A random start and as many random operations as the level asks."""
    start = rng.randrange(100)
    operations = [rng.choice("+-") + str(rng.randrange(1, 10)) for _ in range(_OPERATIONS[level])]
    value, lines = start, []
    for operation in operations:
        after = apply_operation(value, operation)
        lines.append(f"{value:02d}{operation}={after:02d}")
        value = after
    question = f"{start:02d}{''.join(operations)}:"
    answer = f"{value:02d}"
    return LabTask(question=question, answer=answer, solution=";".join([*lines, f"A:{answer}"]), key=question)


def _is_right(text: str, before: str, operation: str | None) -> bool:
    """Whether ``text`` follows from the number ``before``; ``operation`` is None where the answer is due."""
    if operation is None:
        return text == f"A:{before}"
    match = _EQUATION.fullmatch(text)
    if match is None:
        return False
    value, sign, digit, after = match.groups()
    return value == before and sign + digit == operation and int(after) == apply_operation(int(value), operation)


def steps(question: str, answer: str, response: str) -> list[Step]:
    """The equations of a response and its answer line, each judged against the number stated before it.

    After a mistake the chain continues from the wrong number, so later steps can be right again; the answer is not.
    """
    start, operations = _parse(question)
    before, found, position = f"{start:02d}", [], 0
    for index, text in enumerate(response.rstrip().split(";")):
        operation = operations[index] if index < len(operations) else None
        right = index <= len(operations) and _is_right(text, before, operation)
        found.append(Step(position, position + len(text), text, right))
        position += len(text) + 1
        before = text[-2:]
    return found


def grade(question: str, answer: str, response: str) -> bool:
    """Whether the response ends in ``A:`` and the right number."""
    match = _ANSWER.search(response)
    return match is not None and int(match[1]) == int(answer)


FAMILY = Family(
    name="chain",
    levels={level: f"{count} additions or subtractions of one digit, mod 100" for level, count in _OPERATIONS.items()},
    training_level=3,
    draw=draw,
    steps=steps,
    grade=grade,
)
