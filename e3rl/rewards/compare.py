r"""Whether two answers are the same, by their structure: choices, words, quantities, equations, lists, tuples, sets.

Expressions are compared by their values (`e3rl.rewards.values`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from e3rl.rewards.choices import doubtful
from e3rl.rewards.expression import Node, read_expression
from e3rl.rewards.intervals import by_intervals, by_relations
from e3rl.rewards.notation import CURRENCY, clean, matching, read_matrix, split_at, split_list, squeezed, unwrapped
from e3rl.rewards.quantities import SIGNIFICANT, Quantity, read_quantity, written_for
from e3rl.rewards.rules import RULES
from e3rl.rewards.units import read_unit, units_conflict
from e3rl.rewards.values import between, constant, proportional, same_value

_DEPTH = 4  # lists in lists, at most
_MOST = 64  # elements of a list that are compared one by one


def same_answer(gold: str, answer: str) -> bool:
    """Whether ``answer`` means the same as ``gold``; neither is running text."""
    return _same(_bare(clean(gold)), _bare(clean(answer)), 0)


_IN_BRACKETS = re.compile(r"(?<=\d) ?\(([a-z -]{3,40})\)$")
_MEMBER = re.compile(r"[A-Za-z] ?\\in ?(?=[\[({\\A-Z])")


def _bare(text: str) -> str:
    """Without wrappers around the whole, without ``x ∈`` before a set, and without a number's repetition in words."""
    if (found := _IN_BRACKETS.search(text)) is not None:  # 5 (five)
        number, words = read_quantity(text[: found.start()]), read_quantity(found[1])
        if number is not None and words is not None and number.value == words.value:
            text = text[: found.start()]
    text = unwrapped(text)
    member = _MEMBER.match(text)
    return unwrapped(text[member.end() :] if member else text)


def _same(gold: str, answer: str, depth: int) -> bool:
    if squeezed(gold) == squeezed(answer):
        return bool(gold)
    for rule in RULES:
        verdict = rule(gold, answer)
        if verdict is not None:
            return verdict
    if depth < _DEPTH:
        for deeper in (_by_matrix, _by_relations, _by_unit, _by_approximation, _by_equation, _by_elements):
            verdict = deeper(gold, answer, depth)
            if verdict is not None:
                return verdict
    return _by_value(gold, answer)


def _by_relations(gold: str, answer: str, depth: int) -> bool | None:
    """Intervals and inequalities."""

    def equal(one: str, two: str) -> bool:
        return _same(_bare(one), _bare(two), depth + 1)

    verdict = by_intervals(gold, answer, equal)
    return by_relations(gold, answer, equal) if verdict is None else verdict


# --- expressions


def _expression(text: str) -> Node | None:
    """A text as an expression: a plain quantity's number, or the parsed text."""
    number = read_quantity(text)
    if number is None:
        return read_expression(text.replace(CURRENCY, ""))
    return ("n", number.value) if not number.percent else None


def _by_value(gold: str, answer: str) -> bool:
    left, right = _expression(gold), _expression(answer)
    if left is None or right is None:
        return False
    decimals = [read_quantity(text) for text in (gold, answer)]
    for decimal, other in zip(decimals, (right, left), strict=True):
        if decimal is not None and _approximates(decimal, other):
            return True
    return same_value(left, right)


def _approximates(decimal: Quantity, other: Node) -> bool:
    """Whether a decimal of many digits is a constant, rounded or cut off."""
    return decimal.digits is not None and decimal.digits >= SIGNIFICANT and between(other, *written_for(decimal))


# --- matrices


def _by_matrix(gold: str, answer: str, depth: int) -> bool | None:
    if "\\begin" not in gold and "\\begin" not in answer:
        return None
    left, right = read_matrix(gold), read_matrix(answer)
    if left is None or right is None or left[0] != right[0] or list(map(len, left[1])) != list(map(len, right[1])):
        return False
    return all(_all_same(g, a, depth) for g, a in zip(left[1], right[1], strict=True))


# --- units and approximations


_WORDS_BEHIND = re.compile(r"(?:\\[A-Za-z]{1,20})?((?: [A-Za-z.]{2,20}){1,5})$")


def _split_unit(text: str) -> tuple[str, str | None]:
    """An expression and the unit after it."""
    if split_list(text) != [text]:
        return text, None
    start = text.find("\\text")
    if start > 0:
        unit = read_unit(text[start:])
        return (text[:start].strip(), unit) if unit else (text, None)
    words = _WORDS_BEHIND.search(text, max(0, len(text) - 50))
    if words is None:
        return text, None
    unit = read_unit(words[1])
    return (text[: words.start(1)].strip(), unit) if unit else (text, None)


def _by_unit(gold: str, answer: str, depth: int) -> bool | None:
    (left, left_unit), (right, right_unit) = _split_unit(gold), _split_unit(answer)
    if left_unit is None and right_unit is None:
        return None
    return not units_conflict(left_unit, right_unit) and _same(left, right, depth + 1)


_APPROXIMATELY = re.compile(r"\\(?:approx|simeq|doteq)(?![A-Za-z])")


def _by_approximation(gold: str, answer: str, depth: int) -> bool | None:
    """The exact side of ``… ≈ …`` counts, or the value of a name."""
    exact = [_exact_side(text) for text in (gold, answer)]
    return None if exact == [gold, answer] else _same(exact[0], exact[1], depth + 1)


def _exact_side(text: str) -> str:
    parts = split_at(text, _APPROXIMATELY)
    if len(parts) < 2:
        return parts[0] if parts and _APPROXIMATELY.match(text) else text
    if _is_name(parts[0]):
        return parts[1]
    exact, about = _expression(parts[0]), read_quantity(parts[1])
    if exact is None or about is None or len(parts) > 2:
        return text
    margin = about.ulp or abs(about.value) / 20
    return parts[0] if between(exact, about.value - margin, about.value + margin) else text


# --- equations

_SIMPLE = r"\\?[A-Za-z]+'*(?:_\{?\w+\}?)?"
_NAME = re.compile(
    rf"{_SIMPLE}(?:\({_SIMPLE}(?:,{_SIMPLE})*\)|\(\d+\))?|\|[A-Za-z]{{1,3}}\||\({_SIMPLE}(?:[,;]{_SIMPLE})*\)"
    rf"|{_SIMPLE}:{_SIMPLE}|\\frac\{{[A-Z]{{1,2}}\}}\{{[A-Z]{{1,2}}\}}|\\text\{{[^{{}}]*\}}|\\angle{_SIMPLE}"
    rf"|{_SIMPLE}(?:{_SIMPLE}){{0,3}}|[A-Za-z ]{{4,}}"
)
_EQUALS = re.compile(r"(?<![<>!:\\])=(?!=)")


def _is_name(text: str) -> bool:
    if len(text) > 40 or text in ("i", "e", "\\pi") or doubtful(text):
        return False
    return _NAME.fullmatch(squeezed(text)) is not None


def _sides(text: str) -> list[str]:
    if "=" not in text or split_list(text) != [text] or re.search(r"[<>]|\\le|\\ge|\\ne|\\begin", text):
        return [text]
    return split_at(text, _EQUALS)


_TORN = re.compile(r"(?<![\^_])[-+*]$|[/^_]$|^[*/^_]")  # no side ends or begins so, except names (x^*)


def _value(sides: Sequence[str]) -> str | None:
    """The value that a chain of equations gives to its name or arithmetic; None for a genuine, a false or an unreadable one."""
    if len(sides) < 2 or any(_TORN.search(squeezed(side)) for side in sides):
        return None
    nodes = [_expression(side) for side in sides]
    if any(node is None and not _is_name(side) for side, node in zip(sides[1:-1], nodes[1:-1], strict=True)):
        return None
    numbers = [side for side, node in zip(sides, nodes, strict=True) if node is not None and constant(node)]
    if len(sides) > 2 and any(not _by_value(side, sides[-1]) for side in numbers):
        return None
    if len(numbers) == len(sides) and not _by_value(sides[0], sides[1]):
        return None
    if len(sides) > 2 or _is_name(sides[0]) or len(numbers) == len(sides):
        return sides[-1]
    turned = re.fullmatch(r"\\?[A-Za-z](?:_\{?\w{1,20}\}?)?", squeezed(sides[1])) and len(numbers) == 1
    return sides[0] if turned else None


def _name_of(text: str) -> str | None:
    """The name that an equation gives a value, alone on one side."""
    sides = _sides(text)
    return squeezed(sides[0]) if len(sides) > 1 and _is_name(sides[0]) and _value(sides) is not None else None


def _by_equation(gold: str, answer: str, depth: int) -> bool | None:
    left, right = _sides(gold), _sides(answer)
    if len(left) == 1 and len(right) == 1:
        return None
    if len(left) > 1 and len(right) > 1:
        return _both_equations(left, right, depth)
    value = _value(left) if len(left) > 1 else _value(right)
    if value is None:
        return False
    return _same(value, answer, depth + 1) if len(left) > 1 else _same(gold, value, depth + 1)


def _both_equations(left: list[str], right: list[str], depth: int) -> bool:
    one, two = _value(left), _value(right)
    if one is not None and two is not None and (len(left) + len(right) > 4 or squeezed(left[0]) == squeezed(right[0])):
        names = {squeezed(side[0]) for side in (left, right) if _is_name(side[0])}
        return len(names) < 2 and _same(one, two, depth + 1)
    if len(left) != 2 or len(right) != 2:
        return False
    if squeezed(left[0]) == squeezed(right[0]) and _same(left[1], right[1], depth + 1):
        return True
    nodes = [_expression(side) for side in (*left, *right)]
    if any(node is None for node in nodes):
        return False
    differences: list[Node] = [("+", (nodes[i], ("neg", nodes[i + 1]))) for i in (0, 2)]
    return proportional(differences[0], differences[1])


# --- lists, tuples, sets


def _opened(text: str) -> tuple[str, list[str], str]:
    """Opening bracket, elements and closing bracket; no brackets if the whole is not one bracketed list."""
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


_SIGNED_PAIR = re.compile(r"[(\[][^()\[\]]*\\pm[^()\[\]]*,")


def _expanded(parts: Sequence[str]) -> list[str]:
    """Each ``a ± b`` as two elements."""
    found: list[str] = []
    for part in parts:
        if "\\pm" in part and part.count("\\pm") < 3 and not _SIGNED_PAIR.search(part):
            plus = re.sub(r"\\pm ?", "+", part).replace("\\mp", "-")
            minus = re.sub(r"\\pm ?", "-", part).replace("\\mp", "+")
            found += [plus.strip().removeprefix("+"), minus.strip()]
        else:
            found.append(part)
    return found


def _by_elements(gold: str, answer: str, depth: int) -> bool | None:
    """Compares lists and sets in any order, tuples in order; every element must occur equally often in both."""
    (open_g, left, close_g), (open_a, right, close_a) = _opened(gold), _opened(answer)
    left, right = _expanded(left), _expanded(right)
    if max(len(left), len(right)) < 2 and "\\{" not in (open_g, open_a):
        return None
    if len(left) != len(right) or len(left) > _MOST:
        return False
    brackets = {open_g + close_g, open_a + close_a}
    if brackets in ({"()", "\\{}"}, {"()", "[]"}) or (len(brackets) == 2 and brackets & {"[]", "[)", "(]"}):
        return False
    if brackets == {"()", ""} and "\\infty" in gold + answer:
        return False  # an interval, and a list
    named = _paired(left, right, depth) if brackets <= {"", "\\{}"} else None
    if named is not None:
        return named
    ordered = bool(brackets - {"\\{}", ""})
    return _all_same(left, right, depth) if ordered else _matched(left, right, depth)


def _paired(left: Sequence[str], right: Sequence[str], depth: int) -> bool | None:
    """Compares values of several names: by name, or in order if one side omits the names. None if there are none."""
    names = [[_name_of(part) for part in side] for side in (left, right)]
    told = [None not in side and len(set(side)) == len(side) for side in names]
    if not any(told):
        return None
    if all(told):
        if set(names[0]) != set(names[1]):
            return False
        right = [right[names[1].index(name)] for name in names[0]]
    return _all_same(left, right, depth)


def _all_same(left: Sequence[str], right: Sequence[str], depth: int) -> bool:
    return len(left) == len(right) and all(
        _same(_bare(g), _bare(a), depth + 1) for g, a in zip(left, right, strict=True)
    )


def _matched(left: Sequence[str], right: Sequence[str], depth: int) -> bool:
    """Whether the elements of both can be paired. Equality is transitive, so taking the first equal element is enough."""
    free = [_bare(a) for a in right]
    for element in (_bare(g) for g in left):
        partner = next((i for i, a in enumerate(free) if _same(element, a, depth + 1)), None)
        if partner is None:
            return False
        del free[partner]
    return True
