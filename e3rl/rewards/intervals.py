r"""Intervals and what says the same: ``[0, 1)``, ``0 \le x < 1``, ``x \in [0, 1)``, unions, ``x \ne 3``, all real numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from e3rl.rewards.notation import matching, split_list, squeezed

_UNION = re.compile(r"\\cup|\bU\b|\\text\s*\{\s*or\s*\}|(?<![A-Za-z])or(?![A-Za-z])|\\lor|\\vee")
_RELATION = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|<|>")
_VARIABLE = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([a-z]\))?")
_ALL = {"\\mathbb{R}", "\\text{allrealnumbers}", "allrealnumbers", "\\R", "\\text{R}"}
_LOW, _HIGH = "-\\infty", "\\infty"


@dataclass(frozen=True)
class Interval:
    """Ends as they are written, and whether each belongs to it."""

    low: str
    high: str
    low_closed: bool
    high_closed: bool


def read_intervals(text: str) -> list[Interval] | None:
    """The intervals that cleaned text unites; None where it is something else. A bare ``(a, b)`` may be a point as well."""
    if squeezed(text).replace(" ", "") in _ALL:
        return [Interval(_LOW, _HIGH, False, False)]
    if (excluded := re.fullmatch(rf"({_VARIABLE.pattern})\s*\\ne\s*([^,<>=]+)", text)) is not None:
        return [Interval(_LOW, excluded[2], False, False), Interval(excluded[2], _HIGH, False, False)]
    found: list[Interval] = []
    for part in _UNION.split(text):
        one = _bracketed(part.strip()) or _related(part.strip())
        if one is None:
            return None
        found.append(one)
    return found


def _bracketed(text: str) -> Interval | None:
    if not text or text[0] not in "([" or text[-1] not in ")]" or matching(text, 0) != len(text) - 1:
        return None
    ends = split_list(text[1:-1])
    if len(ends) != 2:
        return None
    return Interval(_infinite(ends[0]), _infinite(ends[1]), text[0] == "[", text[-1] == "]")


def _infinite(end: str) -> str:
    plain = re.sub(r"\\?(?:infty|infinity)", r"\\infty", squeezed(end)).removeprefix("+")
    return plain if plain in (_LOW, _HIGH) else end


def _related(text: str) -> Interval | None:
    """``a < x \\le b`` and its shorter forms. The variable is the side that is one name; several names are no interval."""
    sides, signs = [s.strip() for s in _RELATION.split(text)], _RELATION.findall(text)
    if not 1 <= len(signs) <= 2 or not all(sides) or "=" in text:
        return None
    names = [i for i, side in enumerate(sides) if _VARIABLE.fullmatch(side) and side not in ("\\pi", "e", "\\infty")]
    if len(names) != 1:
        return None
    low, high = (_LOW, False), (_HIGH, False)
    for i, sign in enumerate(signs):
        if names[0] not in (i, i + 1):
            return None
        closed = sign in ("\\le", "\\ge")
        upward = sign in ("<", "\\le")  # the left side is the smaller
        bound = sides[i + 1] if names[0] == i else sides[i]
        if upward == (names[0] == i):
            high = (_infinite(bound), closed)
        else:
            low = (_infinite(bound), closed)
    return Interval(low[0], high[0], low[1], high[1])
