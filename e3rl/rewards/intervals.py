r"""Intervals and their other notations: ``[0, 1)``, ``0 \le x < 1``, ``x \in [0, 1)``, unions, ``x \ne 3``, all real numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from e3rl.rewards.expression import Node, read_expression
from e3rl.rewards.notation import matching, split_at, split_list, squeezed
from e3rl.rewards.values import proportional

Equal = Callable[[str, str], bool]

_UNION = re.compile(r"\\cup|\bU\b|\\text\s*\{\s*or\s*\}|(?<![A-Za-z])or(?![A-Za-z])|\\lor|\\vee")
_RELATION = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|<|>")
_VARIABLE = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([a-z]\))?")
_ALL = {"\\mathbb{R}", "\\text{allrealnumbers}", "allrealnumbers", "\\R", "\\text{R}"}
_LOW, _HIGH = "-\\infty", "\\infty"


@dataclass(frozen=True)
class Interval:
    """Ends as written, whether each is included, and the variable that an inequality bounds."""

    low: str
    high: str
    low_closed: bool
    high_closed: bool
    name: str = ""


def read_intervals(text: str) -> list[Interval] | None:
    """Cleaned text as a union of intervals; None if it is something else. A bare ``(a, b)`` may be a point as well."""
    if squeezed(text).replace(" ", "") in _ALL:
        return [Interval(_LOW, _HIGH, False, False)]
    if (excluded := re.fullmatch(rf"({_VARIABLE.pattern}) ?\\ne ?([^,<>=]+)", text)) is not None:
        return [
            Interval(_LOW, excluded[2], False, False, excluded[1]),
            Interval(excluded[2], _HIGH, False, False, excluded[1]),
        ]
    found: list[Interval] = []
    parts = [part.strip() for part in _UNION.split(text)]
    for part in parts:
        one = _bracketed(part) or _related(part)
        if one is not None:
            found.append(one)
        elif len(parts) > 1 and part.startswith("\\{") and part.endswith("\\}"):
            found += [Interval(end, end, True, True) for end in split_list(part[2:-2])]
        else:
            return None
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
    if (
        len(sides) == 2
        and (size := re.fullmatch(r"\| ?([a-z]) ?\|", sides[0])) is not None
        and signs[0] in ("<", "\\le")
    ):
        return _related(f"-({sides[1]}) {signs[0]} {size[1]} {signs[0]} {sides[1]}")
    names = [
        i
        for i, side in enumerate(sides)
        if len(side) <= 40 and _VARIABLE.fullmatch(side) and side not in ("\\pi", "e", "\\infty")
    ]
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
    return Interval(low[0], high[0], low[1], high[1], squeezed(sides[names[0]]))


def by_intervals(gold: str, answer: str, equal: Equal) -> bool | None:
    """Compares intervals, inequalities and their unions end by end. For two bare pairs (tuples) this compares in order."""
    left, right = read_intervals(gold), read_intervals(answer)
    if left is None or right is None:
        return None
    if len(left) != len(right):
        return False

    def same(one: Interval, two: Interval) -> bool:
        if one.name and two.name and one.name != two.name:
            return False
        closed = (one.low_closed, one.high_closed) == (two.low_closed, two.high_closed)
        ends = ((one.low, two.low), (one.high, two.high))
        return closed and all(equal(g, a) for g, a in ends)

    free = list(right)
    for interval in left:
        partner = next((i for i, other in enumerate(free) if same(interval, other)), None)
        if partner is None:
            return False
        del free[partner]
    return True


_SIGN = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])|<|>")
_TURNED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}


def by_relations(gold: str, answer: str, equal: Equal) -> bool | None:
    """Compares inequalities up to a factor, and chains of them side by side, in either direction."""
    if not (_SIGN.search(gold) or _SIGN.search(answer)) or split_list(gold) != [gold]:
        return None
    (left, signs), (right, others) = [(split_at(text, _SIGN), _SIGN.findall(text)) for text in (gold, answer)]
    if len(left) != len(right) or len(signs) != len(others) or len(left) != len(signs) + 1:
        return False
    turned = [_TURNED[s] for s in reversed(others)]
    if signs == others and all(map(equal, left, right)):
        return True
    if signs == turned and all(map(equal, left, right[::-1])):
        return True
    if len(signs) > 1 or signs not in (others, turned):
        return False
    nodes = [read_expression(side) for side in (*left, *(right if signs == others else right[::-1]))]
    if any(node is None for node in nodes):
        return False
    differences: list[Node] = [("+", (nodes[i], ("neg", nodes[i + 1]))) for i in (0, 2)]
    return proportional(differences[0], differences[1], positive=signs != ["\\ne"])
