"""Arithmetic questions in plain words, for models that speak English; graded by the last number of the response."""

from __future__ import annotations

import re
from random import Random

from e3rl.lab.family import Family, LabTask, Step

_NUMBER = re.compile(r"(?<![\d.])-?\d+(?:\.\d+)?")
_WORDINGS = ("What is {}?", "Calculate {}.", "How much is {}?", "What does {} equal?", "Please work out {}.")

_LEVELS = {
    1: ("+-", (2, 9), (1, 9)),
    2: ("+-", (10, 99), (1, 9)),
    3: ("+-", (10, 99), (10, 99)),
    4: ("*", (2, 9), (2, 9)),
    5: ("*", (10, 99), (2, 9)),
}
"""Operators, and the ranges of the larger and of the other operand."""

_DESCRIPTIONS = {
    1: "one-digit sums and differences",
    2: "two digits plus or minus one digit",
    3: "two digits plus or minus two digits",
    4: "one-digit products",
    5: "two digits times one digit",
}


def draw(level: int, rng: Random) -> LabTask:
    """A random question of the level. Differences are never negative."""
    operators, first, second = _LEVELS[level]
    operator = rng.choice(operators)
    a, b = sorted((rng.randint(*first), rng.randint(*second)), reverse=True)
    answer = {"+": a + b, "-": a - b, "*": a * b}[operator]
    left, right = (a, b) if operator == "-" or rng.random() < 0.5 else (b, a)
    question = rng.choice(_WORDINGS).format(f"{left} {operator} {right}")
    return LabTask(question, str(answer), f"{left} {operator} {right} = {answer}", key=f"{a}{operator}{b}")


def _last_number(text: str) -> re.Match[str] | None:
    return max(_NUMBER.finditer(text.replace(",", " ")), key=lambda match: match.start(), default=None)


def steps(question: str, answer: str, response: str) -> list[Step]:
    """The last number of the response, as the one step that can be judged; empty where there is none."""
    number = _last_number(response)
    if number is None:
        return []
    return [Step(number.start(), number.end(), number[0], float(number[0]) == float(answer))]


def grade(question: str, answer: str, response: str) -> bool:
    """Whether the last number of the response is the answer."""
    return any(step.right for step in steps(question, answer, response))


FAMILY = Family(name="arith", levels=_DESCRIPTIONS, training_level=1, draw=draw, steps=steps, grade=grade)
