"""Whether two answers are equal. Runs in the worker processes alone: some inputs never come back from math-verify."""

from __future__ import annotations

import functools
import logging
import math
import re
from typing import Any

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from e3rl.rewards.compare import same_answer
from e3rl.rewards.notation import CURRENCY

for _module in (
    "math_verify.parser",
    "math_verify.grader",
):  # they warn that their timeouts are off: the worker has its own
    logging.getLogger(_module).setLevel(logging.ERROR)

_RELATIVE = 1e-6
_SYMBOLS = 8
_STEPS = (sympy.floor, sympy.ceiling, sympy.Abs, sympy.sign, sympy.Mod, sympy.Min, sympy.Max, sympy.Piecewise)
"""Functions that agree on whole stretches without being equal."""

_POINTS = (sympy.Rational(7, 5), sympy.Rational(-3, 7), sympy.Rational(1, 9))
_DERIVATIVE = re.compile(r"\\frac\s*\{\s*(?:d|\\partial)[^{}]*\}\s*\{\s*(?:d|\\partial)")

DEEPEST = 40
"""Brackets in brackets beyond which an answer is equal to its copy alone."""


_LATEX, _PLAIN = (LatexExtractionConfig(),), (ExprExtractionConfig(),)


@functools.lru_cache(maxsize=4096)
def _parsed(answer: str) -> list[Any]:
    """The expression that the whole answer is, never a part: where LaTeX fails, math-verify would take any number inside."""
    found = parse(f"${answer}$", extraction_config=_LATEX, parsing_timeout=None)  # type: ignore[arg-type]
    if any(not isinstance(e, str) for e in found) or "\\" in answer:
        return found
    plain = parse(answer, extraction_config=_PLAIN, parsing_timeout=None)  # type: ignore[arg-type]
    whole = any(isinstance(e, str) and e.strip() == answer.strip() for e in plain)
    return plain if whole else found


def algebra(gold: str, answer: str) -> bool:
    """math-verify's word on two expressions. An inequality may answer an interval; a set has no order."""
    if _DERIVATIVE.search(gold + answer):  # it takes the derivative of a symbol, which is 0
        return False
    return _verified(gold, answer) or (
        _DECIMAL.search(gold + answer) is not None
        and _verified(_DECIMAL.sub(_exact, gold), _DECIMAL.sub(_exact, answer))
    )


_DECIMAL = re.compile(r"(?<![\d.,])(\d*)\.(\d+)(?![\d.,])")


def _exact(found: re.Match[str]) -> str:
    """A decimal as a fraction, since rounding would hide that 0.5 + 0.5i is (1 + i)/2."""
    return rf"\frac{{{int(found[1] + found[2])}}}{{{10 ** len(found[2])}}}"


def _verified(gold: str, answer: str) -> bool:
    left, right = (_parsed(text.replace(CURRENCY, "")) for text in (gold, answer))
    if verify(left, right, allow_set_relation_comp=True, timeout_seconds=None):
        return not _far_apart(left, right)
    pair = [next((e for e in side if isinstance(e, sympy.Expr)), None) for side in (left, right)]
    return pair[0] is not None and pair[1] is not None and _equal_at_points(pair[0], pair[1])


def _equal_at_points(left: sympy.Expr, right: sympy.Expr) -> bool:
    """Whether two expressions agree wherever they are tried, ``i`` being the imaginary unit and ``e`` Euler's number.

    It finds what simplification misses, (1 + i)^2 = 2i or n!/(n - 1)! = n; expressions that differ somewhere do not pass.
    """
    names = sorted({str(symbol) for side in (left, right) for symbol in side.free_symbols})
    if len(names) > _SYMBOLS or any(side.has(*_STEPS) for side in (left, right)):
        return False
    for k, scale in enumerate(_POINTS):
        values = {name: scale * sympy.sqrt(2 + 3 * i + k) for i, name in enumerate(names)}
        values |= {"i": sympy.I, "e": sympy.E}
        found = [side.subs({s: values[str(s)] for s in side.free_symbols}).evalf(20) for side in (left, right)]
        try:
            one, two = map(complex, found)
        except (TypeError, ValueError):  # it has no value there
            return False
        size = max(abs(one), abs(two))
        if not (math.isfinite(size) and abs(one - two) <= _RELATIVE**2 * size):
            return False
    return True


def _far_apart(left: list[Any], right: list[Any]) -> bool:
    """Whether both are numbers and differ by more than rounding: math-verify rounds to six places, however small they are."""
    values = []
    for side in (left, right):
        found = next((e for e in side if getattr(e, "is_number", False)), None)
        if found is None or not found.is_finite:
            return False
        values.append(complex(found.evalf(15)))
    size = max(map(abs, values))
    return abs(values[0] - values[1]) > _RELATIVE * size


def equivalent(gold: str, answer: str) -> bool:
    """Whether ``answer`` means the same as ``gold``; neither is running text."""
    if max(map(_nesting, (gold, answer))) > DEEPEST:
        return gold == answer
    return same_answer(gold, answer, algebra)


def _nesting(text: str) -> int:
    """How deep brackets stand in brackets: a parser's time can double with each."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


equivalent("x+1", "x+2")  # builds math-verify's patterns while the worker loads, so that no answer's time pays for them
