"""The work that reading an answer takes grows no faster than its length times the logarithm of that.

Counted where the code is ours (calls of Python functions), timed where a regular expression does it.
"""

from __future__ import annotations

import ast
import importlib
import math
import re
import time
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

ROOM = Path(answers.__file__).parent
PIECES = (
    " ", "\n", "\t", "1", "1,", "1, ", "1/", "1 ", "-", "- ", "+", "(", ")", "[", "{", "}", "{}", "{,}", "|", "\\",
    "\\\\", "$", "$1", "\\(", "\\)", "\\[", "\\text{", "\\text{a}", "\\text {and}", "\\boxed", "\\boxed{",
    "\\boxed{1}", "\\boxed ", "\\boxed{1}, ", "and ", "or ", "a ", "a", "A", "A, ", "(A) ", "A: ", "answer ",
    "answer is ", "The answer is 1. ", "\\frac", "\\frac{", "\\frac{1}{", "\\frac1", "\\sqrt", "\\pm ", "=", "x=",
    "x = 1, ", "<", "x<", "\\le ", "\\cup ", "(1,2)\\cup", "^", "2^", "_", "a_", "1_", "!", "'", "%", "1%", "**",
    "**a** ", "^\\circ ", "cm ", "cm^2 ", " per ", "one ", ".", "1.", ". ", "; ", ":", "1:", "&", "\\begin{pmatrix}",
    "because ", ", not ", "final answer is ", "#### ", "maybe ", "é", "1 squared ", "$1$, ", "\\overline{", "√", "²",
    "</think>", "<think>", "²(", "¤", "\\ ", "\\!", "~", "10^", "10^{", "1e", "\\in ", "\\approx ", "\\mathrm{~",
    "\\left(", "x \\ne ", "f(", "sin", "sin ", "\\sin ",
)  # fmt: skip
AROUND = (("", ""), ("1", "!"), ("\\boxed{1}", "!\\boxed{2}"), ("answer is ", "!"))
AROUND_ANSWERS = (("", ""), ("x", "y"), ("(", "!)"))

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


def _seconds(function, text: str) -> float:
    best = math.inf
    for _ in range(4):
        began = time.process_time()
        function(text)
        best = min(best, time.process_time() - began)
        if best < 2e-3:
            break
    return best


def _too_steep(function, sizes: tuple[int, int], places=AROUND) -> list[str]:
    """Inputs for which eight times the length takes more than 24 times as long, and long enough to be measured."""
    steep = []
    for before, after in places:
        for piece in PIECES:
            small, large = (before + piece * (size // len(piece)) + after for size in sizes)
            long = _seconds(function, large)
            if long > 8e-3 and long > 3 * (sizes[1] / sizes[0]) * max(_seconds(function, small), 3e-4):
                steep.append(f"{before!r} {piece!r} {after!r}: {long:.3f} s for {sizes[1]} characters")
    return steep


@pytest.mark.parametrize("name", WHOLE)
def test_responses_are_read_in_linear_time(name: str) -> None:
    assert _too_steep(WHOLE[name], (1_000, 8_000)) == []


@pytest.mark.parametrize("name", BOUNDED)
def test_answers_are_read_in_linear_time(name: str) -> None:
    assert _too_steep(BOUNDED[name], (250, 2_000), AROUND_ANSWERS) == []


MODULES = sorted(p.stem for p in ROOM.glob("*.py") if "re.compile" in p.read_text(encoding="utf-8"))
METHODS = {"match", "fullmatch", "search", "sub", "split", "findall", "finditer"}


def _uses(module: str) -> dict[str, tuple[re.Pattern[str], set[str]]]:
    """The module's compiled patterns, and the methods that it calls on each."""
    tree = ast.parse((ROOM / f"{module}.py").read_text(encoding="utf-8"))
    called: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in METHODS:
            called.setdefault(node.value.id, set()).add(node.attr)
    names = vars(importlib.import_module(f"e3rl.rewards.{module}"))
    found = {n: (p, called.get(n, {"search"})) for n, p in names.items() if isinstance(p, re.Pattern)}
    listed = [p for p, _ in names.get("_SPELLINGS", [])]
    return found | {f"_SPELLINGS[{i}]": (p, {"sub"}) for i, p in enumerate(listed)}


@pytest.mark.parametrize("module", MODULES)
def test_every_pattern_is_linear(module: str) -> None:
    """Each compiled pattern of the module, as the module uses it, on repetitions of every piece without runs of blanks."""
    uses = _uses(module)
    assert uses
    for name, (pattern, methods) in uses.items():
        for method in methods:
            call = getattr(pattern, method)
            apply = (
                (lambda t, c=call: c("", t))
                if method == "sub"
                else (lambda t, c=call: list(c(t) or ()) if c.__name__ == "finditer" else c(t))
            )
            assert _too_steep(lambda t, a=apply: a(notation.tidied(t)), (250, 2_000), AROUND_ANSWERS) == [], (
                f"{name}.{method}"
            )


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
