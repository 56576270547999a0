"""The work that reading an answer takes grows no faster than its length times the logarithm of that.

Counted where the code is ours (calls of Python functions), timed where a regular expression does it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from e3rl.rewards import (
    answers,
    choices,
    compare,
    expression,
    intervals,
    math_check,
    notation,
    quantities,
    rules,
    units,
)
from tests.steep import AROUND_ANSWERS, steep_patterns, too_steep, with_patterns

ROOM = Path(answers.__file__).parent
WHOLE = {
    "tidied": notation.tidied,
    "last_box": answers.last_box,
    "boxed_answer": answers.boxed_answer,
    "after_marker": answers.after_marker,
    "extract_answer": answers.extract_answer,
    "last_choice": lambda t: choices.last_choice(notation.tidied(t)),
    "stated_choice": lambda t: choices.stated_choice(notation.tidied(t)),
}
"""Read responses of any length."""

BOUNDED = {
    "clean": notation.clean,
    "squeezed": lambda t: notation.squeezed(notation.clean(t)),
    "split_list": lambda t: notation.split_list(notation.clean(t)),
    "unwrapped": lambda t: notation.unwrapped(notation.clean(t)),
    "vote": answers.vote,
    "read_choice": lambda t: choices.read_choice(notation.clean(t)),
    "read_quantity": lambda t: quantities.read_quantity(notation.clean(t)),
    "read_unit": lambda t: units.read_unit(notation.clean(t)),
    "read_expression": expression.read_expression.__wrapped__,
    "read_intervals": lambda t: intervals.read_intervals(notation.clean(t)),
    "by_choice": lambda t: rules.by_choice("A", notation.clean(t)),
    "by_words": lambda t: rules.by_words("even", notation.clean(t)),
    "by_colon": lambda t: rules.by_colon("1:2", notation.clean(t)),
    "by_base": lambda t: rules.by_base("101_2", notation.clean(t)),
    "same_answer": lambda t: compare.same_answer("x+1", t),
    "check": lambda t: math_check.check("x+1", t),
}
"""Read an answer of up to `LONGEST_ANSWER` characters."""


@pytest.mark.parametrize("name", WHOLE)
def test_responses_are_read_in_linear_time(name: str) -> None:
    assert too_steep(WHOLE[name], (1_000, 8_000)) == []


@pytest.mark.parametrize("name", BOUNDED)
def test_answers_are_read_in_linear_time(name: str) -> None:
    assert too_steep(BOUNDED[name], (250, 2_000), AROUND_ANSWERS) == []


@pytest.mark.parametrize("path", with_patterns(ROOM), ids=lambda p: p.stem)
def test_every_pattern_is_linear(path: Path) -> None:
    """Each compiled pattern of the module, as the module uses it, on repetitions of every piece without runs of blanks."""
    assert steep_patterns(path, AROUND_ANSWERS, notation.tidied) == []


def test_no_pattern_is_hidden_from_the_gate() -> None:
    """A pattern inside a function is short: at most one repetition without a bound."""
    for path in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and getattr(node.func.value, "id", "") == "re"
            ):
                first = node.args[0] if node.args else None
                if node.func.attr != "compile" and isinstance(first, ast.Constant):
                    plain = re.sub(r"\\.|\[[^\]]*\]", "x", str(first.value))
                    assert len(re.findall(r"[*+]|\{\d+,\}", plain)) <= 2, f"{path.name}:{node.lineno}: {first.value}"
