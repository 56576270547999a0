r"""Rules that tell whether two answers are the same without looking inside them: choices, words, quantities, bases, ratios.

Each gives True or False, or None where it has nothing to say.
"""

from __future__ import annotations

import re

from e3rl.rewards.choices import Choice, read_choice
from e3rl.rewards.notation import clean, squeezed
from e3rl.rewards.quantities import Quantity, read_quantity, same_number
from e3rl.rewards.units import units_conflict


def by_choice(gold: str, answer: str) -> bool | None:
    """(A) is A is 'A. because …'; a choice with its text is also that text."""
    left, right = read_choice(gold), read_choice(answer)
    if left and right:
        return left.letter == right.letter
    one = left or right
    if one is None:
        return None
    other = answer if left else gold
    return _content_is(one, other) if one.content else None


def _content_is(choice: Choice, other: str) -> bool | None:
    if squeezed(choice.content).casefold() == squeezed(other).casefold():
        return True
    left, right = read_quantity(clean(choice.content)), read_quantity(other)
    return same_number(left, right) if left and right else None


_WRAPPED = re.compile(r"\\text\s*\{([^{}]*)\}")
_WORD = re.compile(r"[A-Za-z][A-Za-z'.-]*")
_NOT_WORDS = re.compile(
    r"\\(?!text|emptyset|infty)|[=<>^_/*+|\d]|\b(?:sin|cos|tan|sec|csc|cot|log|ln|exp|sqrt|pi|arcsin|arccos|arctan|infinity|infty)\b"
)
_EMPTY = {
    "no solution",
    "no solutions",
    "none",
    "empty set",
    "no real solution",
    "no real solutions",
    "the empty set",
    "\\emptyset",
}


def _words(text: str) -> str | None:
    r"""Plain text, case and spaces evened out: a word of four letters, several words, or any in ``\text{…}``."""
    wrapped = _WRAPPED.search(text) is not None
    plain = _WRAPPED.sub(r" \1 ", text)
    plain = plain.strip(" .,;:!?\"'`*()")
    if not plain or _NOT_WORDS.search(plain) or any(c in plain for c in "()[]{}\\"):
        return None
    words = plain.replace(",", " ").split()
    if not all(_WORD.fullmatch(w) for w in words):
        return None
    if (
        not wrapped
        and len(words) == 1
        and len(words[0]) < 4
        and words[0].casefold() not in ("yes", "no", "odd", "red", "dne")
    ):
        return None
    if len(words) > 1 and words[0].casefold() in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words).casefold()


def _is_empty(text: str, words: str | None) -> bool:
    """Whether an answer says that there is nothing: an empty set, 'no solution'."""
    return squeezed(text) in ("\\emptyset", "\\{\\}") or words in _EMPTY


def by_words(gold: str, answer: str) -> bool | None:
    left, right = _words(gold), _words(answer)
    if _is_empty(gold, left) and _is_empty(answer, right):
        return True
    numbers = [read_quantity(gold) is not None, read_quantity(answer) is not None]
    if all(numbers):
        return None  # number words
    if left is not None and right is not None:
        return squeezed(left) == squeezed(right)
    text = left if left is not None else right
    if text is None:
        return None
    return False if any(numbers) or " " in text else None  # one word may still be a product of variables


def by_quantity(gold: str, answer: str) -> bool | None:
    left, right = read_quantity(gold), read_quantity(answer)
    if left is None or right is None:
        return None
    if same_number(left, right):
        return not units_conflict(left.unit, right.unit)
    return None if _may_be_list(left, right) else False


def _may_be_list(left: Quantity, right: Quantity) -> bool:
    return left.comma and right.comma


_BASE = re.compile(r"\(?([0-9A-Za-z]+)\)?_\s*\{?\s*(?:\\text\s*\{\s*(\w+)\s*\}|(\d+))\s*\}?")
_BASE_WORDS = {
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}


def _based(text: str) -> tuple[str, str] | None:
    found = _BASE.fullmatch(squeezed(text))
    if found is None or not re.search(r"\d", found[1]):
        return None
    base = found[3] or _BASE_WORDS.get(found[2].casefold(), found[2])
    return found[1].upper(), base


def by_base(gold: str, answer: str) -> bool | None:
    """Numerals in a base: digits and base must both agree, and a base that is asked for may not be left out."""
    left, right = _based(gold), _based(answer)
    if left and right:
        return left == right
    one, other = (left, answer) if left else (right, gold)
    return False if one and read_quantity(other) else None


def by_colon(gold: str, answer: str) -> bool | None:
    """Ratios and times of day, part by part."""
    left, right = (re.split(r"\s*:\s*", text.rpartition("=")[2].strip().casefold()) for text in (gold, answer))
    if not all(re.fullmatch(r"[\d.\\a-z/{} ]*\d[\d.\\a-z/{} ]*", part) for part in (*left, *right)):
        return None
    if len(left) > 1 and len(right) > 1:
        return list(map(squeezed, left)) == list(map(squeezed, right))
    one, other = (left, answer) if len(left) > 1 else (right, gold)
    return False if len(one) > 1 and read_quantity(other) else None


RULES = (by_choice, by_words, by_quantity, by_base, by_colon)
"""In the order in which they are asked."""
