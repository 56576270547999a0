r"""Whether two answers are the same, by their structure: choices, words, quantities, equations, lists, tuples, sets.

What is left, an expression against an expression, goes to ``algebra`` (math-verify, in `e3rl.rewards.math_check`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from e3rl.rewards.intervals import Interval, read_intervals
from e3rl.rewards.notation import clean, matching, split_at, split_list, squeezed, unwrapped
from e3rl.rewards.quantities import read_quantity
from e3rl.rewards.rules import RULES
from e3rl.rewards.units import read_unit, units_conflict

Algebra = Callable[[str, str], bool]

_DEPTH = 4  # lists in lists, at most
_MOST = 64  # elements of a list that are compared one by one


def same_answer(gold: str, answer: str, algebra: Algebra) -> bool:
    """Whether ``answer`` means the same as ``gold``; neither is running text."""
    return _same(_bare(clean(gold)), _bare(clean(answer)), algebra, 0)


def _bare(text: str) -> str:
    """Without wrappers around the whole, and without ``x ∈`` before a set."""
    text = re.sub(r"(?<=\d)\s*\([a-z -]{3,}\)$", "", text)  # 5 (five)
    return unwrapped(re.sub(r"^[A-Za-z]\s*\\in\s*(?=[\[({\\A-Z])", "", unwrapped(text)))


def _same(gold: str, answer: str, algebra: Algebra, depth: int) -> bool:
    if squeezed(gold) == squeezed(answer):
        return bool(gold)
    for rule in RULES:
        verdict = rule(gold, answer)
        if verdict is not None:
            return verdict
    if depth < _DEPTH:
        for deeper in (_by_intervals, _by_unit, _by_approximation, _by_equation, _by_elements):
            verdict = deeper(gold, answer, algebra, depth)
            if verdict is not None:
                return verdict
    return algebra(_for_algebra(gold), _for_algebra(answer))


_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")


def _for_algebra(text: str) -> str:
    """Numbers without separators, and angles in degrees as radians where a function takes them."""
    number = read_quantity(text)
    if number is not None and not number.percent:
        return (
            str(number.value)
            if number.value.denominator == 1
            else rf"\frac{{{number.value.numerator}}}{{{number.value.denominator}}}"
        )
    if _TRIGONOMETRIC.search(text):
        return re.sub(r"(\d+(?:\.\d+)?)\s*\^\s*\\circ", r"(\1\\pi/180)", text)
    return text


def _by_intervals(gold: str, answer: str, algebra: Algebra, depth: int) -> bool | None:
    """Intervals, inequalities and unions of them, end by end. Two bare pairs are tuples: their order decides the same."""
    left, right = read_intervals(gold), read_intervals(answer)
    if left is None or right is None or len(left) != len(right):
        return None
    open_ends = [all(not (i.low_closed or i.high_closed) for i in side) for side in (left, right)]

    def same(one: Interval, two: Interval) -> bool:
        closed = (one.low_closed, one.high_closed) == (two.low_closed, two.high_closed)
        ends = ((one.low, two.low), (one.high, two.high))
        return closed and all(_same(_bare(g), _bare(a), algebra, depth + 1) for g, a in ends)

    free = list(right)
    for interval in left:
        partner = next((i for i, other in enumerate(free) if same(interval, other)), None)
        if partner is None:
            return False if not all(open_ends) or "\\cup" not in gold + answer else None
        del free[partner]
    return True


_TRAILING_UNIT = re.compile(
    r"^(.*?[^\s\\])\s*(\\text\s*\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?|(?:square |cubic )?[a-z]{2,}(?: per [a-z]+)?)$"
)


def _split_unit(text: str) -> tuple[str, str | None]:
    """An expression and the unit behind it."""
    found = _TRAILING_UNIT.match(text)
    if found is None or split_list(text) != [text]:
        return text, None
    head, tail = found[1], found[2]
    if not tail.startswith("\\text") and not re.search(r"[\d}\s]$|\\pi$", text[: found.start(2)]):
        return text, None
    unit = read_unit(" " + tail)
    known = unit and (tail.startswith("\\text") or (not units_conflict(unit, unit) and re.search(r"[\d})]|\\pi", head)))
    return (head, unit) if known else (text, None)


def _by_unit(gold: str, answer: str, algebra: Algebra, depth: int) -> bool | None:
    (left, left_unit), (right, right_unit) = _split_unit(gold), _split_unit(answer)
    if left_unit is None and right_unit is None:
        if _TRIGONOMETRIC.search(gold + answer):
            return None
        degrees = [re.sub(r"\s*\^\s*\\circ\s*", "", t) for t in (gold, answer)]
        return None if degrees == [gold, answer] else _same(degrees[0], degrees[1], algebra, depth + 1)
    return not units_conflict(left_unit, right_unit) and _same(left, right, algebra, depth + 1)


def _by_approximation(gold: str, answer: str, algebra: Algebra, depth: int) -> bool | None:
    """The exact side of ``… ≈ …`` counts, or the value of a name."""
    exact = [_exact_side(text) for text in (gold, answer)]
    return None if exact == [gold, answer] else _same(exact[0], exact[1], algebra, depth + 1)


def _exact_side(text: str) -> str:
    parts = re.split(r"\\approx|\\simeq|\\doteq", text)
    if len(parts) == 1:
        return text
    return parts[1].strip() if _NAME.fullmatch(squeezed(parts[0])) else parts[0].strip()


_SIMPLE = r"\\?[A-Za-z]+'*(?:_\{?\w+\}?)?"
_NAME = re.compile(
    rf"{_SIMPLE}(?:\({_SIMPLE}(?:,{_SIMPLE})*\)|\(\d+\))?|\|[A-Za-z]{{1,3}}\||\({_SIMPLE}(?:[,;]{_SIMPLE})*\)"
    rf"|{_SIMPLE}:{_SIMPLE}|\\frac\{{[A-Z]{{1,2}}\}}\{{[A-Z]{{1,2}}\}}|\\text\{{[^{{}}]*\}}|\\angle{_SIMPLE}"
    rf"|{_SIMPLE}(?:{_SIMPLE}){{0,3}}|[A-Za-z ]{{4,}}"
)
_EQUALS = re.compile(r"(?<![<>!:\\])=(?!=)")
_ARITHMETIC = re.compile(r"(?:[\d\s+*/().,^{}¤-]|\\times|\\cdot|\\frac|\\sqrt)+")


def _sides(text: str) -> list[str]:
    if split_list(text) != [text] or re.search(r"[<>]|\\le|\\ge|\\ne|\\begin", text):
        return [text]
    return split_at(text, _EQUALS)


def _value(sides: Sequence[str]) -> str | None:
    """What a chain of equations says its name or its arithmetic is; None where it is an equation in its own right."""
    if len(sides) < 2:
        return None
    if len(sides) > 2 or _NAME.fullmatch(squeezed(sides[0])) or all(_ARITHMETIC.fullmatch(s) for s in sides):
        return sides[-1]
    last = squeezed(sides[-1])
    return (
        sides[0]
        if len(sides) == 2 and re.fullmatch(r"\\?[A-Za-z](?:_\{?\w+\}?)?", last) and _is_constant(sides[0])
        else None
    )


def _is_constant(text: str) -> bool:
    """Whether an expression has no variable."""
    return not re.search(r"(?<!\\)\b[a-zA-Z]\b", text.replace("\\pi", ""))


def _by_equation(gold: str, answer: str, algebra: Algebra, depth: int) -> bool | None:
    left, right = _sides(gold), _sides(answer)
    if len(left) == 1 and len(right) == 1:
        return None
    if len(left) == len(right) == 2 and (
        squeezed(left[0]) == squeezed(right[0]) or (not _value(left) and squeezed(left[1]) == squeezed(right[1]))
    ):
        other = 1 if squeezed(left[0]) == squeezed(right[0]) else 0
        same = _same(left[other], right[other], algebra, depth + 1)
        scalable = squeezed(left[1 - other]) == "0"  # 2x - 4 = 0 is x - 2 = 0; of other equations one side decides
        return same or (None if scalable else False)
    left_value, right_value = _value(left), _value(right)
    if len(left) > 1 and len(right) > 1:
        if left_value and right_value and len(left) + len(right) > 4:
            return _same(left_value, right_value, algebra, depth + 1)
        return None
    one, other_text = (left_value, answer) if len(left) > 1 else (right_value, gold)
    if one is None:
        return False
    return _same(one, other_text, algebra, depth + 1) if len(left) > 1 else _same(other_text, one, algebra, depth + 1)


def _opened(text: str) -> tuple[str, list[str], str]:
    """Opening bracket, elements and closing bracket; no brackets where the whole is not one bracketed list."""
    number = read_quantity(text)
    if number is not None and not number.comma:
        return "", [text], ""
    for opening in ("\\{", "(", "["):
        if text.startswith(opening):
            start = len(opening) - 1
            end = matching(text, start)
            if end == len(text) - 1:
                inner = text[start + 1 : end]
                inner = inner[:-1] if opening == "\\{" and inner.endswith("\\") else inner
                parts = split_list(inner)
                if len(parts) > 1 or opening == "\\{":
                    return opening, parts, text[-1]
    return "", split_list(text), ""


def _expanded(parts: Sequence[str]) -> list[str]:
    """Each ``a ± b`` as two elements."""
    found: list[str] = []
    for part in parts:
        if "\\pm" in part and not re.search(r"[(\[]\s*[^()\[\]]*\\pm[^()\[\]]*,", part):
            plus = re.sub(r"\\pm\s*", "+", part).replace("\\mp", "-")
            minus = re.sub(r"\\pm\s*", "-", part).replace("\\mp", "+")
            found += [plus.strip().removeprefix("+"), minus.strip()]
        else:
            found.append(part)
    return found


def _distinct(parts: Sequence[str]) -> list[str]:
    """The parts, each once: a set does not grow by a repetition."""
    return list({squeezed(part): part for part in parts}.values())


def _by_elements(gold: str, answer: str, algebra: Algebra, depth: int) -> bool | None:
    """Lists and sets in any order, tuples and intervals in theirs."""
    (open_g, left, close_g), (open_a, right, close_a) = _opened(gold), _opened(answer)
    left, right = _expanded(left), _expanded(right)
    if {open_g, open_a} <= {"", "\\{"}:
        left, right = _distinct(left), _distinct(right)
    if max(len(left), len(right)) < 2 and "\\{" not in (open_g, open_a):
        return None
    if re.search(r"[<>]|\\le|\\ge|\\ne", gold + answer) and (open_g or open_a):
        return None  # an interval against an inequality
    if len(left) != len(right) or len(left) > _MOST:
        return False if not (open_g in "([" and open_g and len(right) == 1) else None
    brackets = {open_g + close_g, open_a + close_a} - {""}
    if brackets & {"[]", "[)", "(]"} and len(brackets) == 2:
        return False
    if brackets == {"()", "\\{}"}:
        return False
    ordered = bool(brackets - {"\\{}"})
    return _all_same(left, right, algebra, depth) if ordered else _matched(left, right, algebra, depth)


def _all_same(left: Sequence[str], right: Sequence[str], algebra: Algebra, depth: int) -> bool:
    return all(_same(_bare(g), _bare(a), algebra, depth + 1) for g, a in zip(left, right, strict=True))


def _matched(left: Sequence[str], right: Sequence[str], algebra: Algebra, depth: int) -> bool:
    """Whether every element of one has its own partner in the other. Equality is transitive: the first partner will do."""
    free = [_bare(a) for a in right]
    for element in (_bare(g) for g in left):
        partner = next((i for i, a in enumerate(free) if _same(element, a, algebra, depth + 1)), None)
        if partner is None:
            return False
        del free[partner]
    return True
