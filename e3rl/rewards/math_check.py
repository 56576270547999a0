"""Whether two answers are equal. Runs in the worker processes alone: some inputs never come back from math-verify."""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from math_verify import parse, verify

from e3rl.rewards.compare import same_answer
from e3rl.rewards.notation import CURRENCY

for _module in (
    "math_verify.parser",
    "math_verify.grader",
):  # they warn that their timeouts are off: the worker has its own
    logging.getLogger(_module).setLevel(logging.ERROR)

_RELATIVE = 1e-6

DEEPEST = 40
"""Brackets in brackets beyond which an answer is equal to its copy alone."""


@functools.lru_cache(maxsize=4096)
def _parsed(answer: str) -> list[Any]:
    return parse(f"${answer}$", parsing_timeout=None)  # type: ignore[arg-type]


def algebra(gold: str, answer: str) -> bool:
    """math-verify's word on two expressions. An inequality may answer an interval; a set has no order."""
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
    return verify(left, right, allow_set_relation_comp=True, timeout_seconds=None) and not _far_apart(left, right)


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
