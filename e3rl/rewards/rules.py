r"""Rules that compare two answers without parsing them as expressions: choices, words, quantities, bases, ratios.

Each gives True or False, or None if it does not apply.
"""

from __future__ import annotations

import re

from e3rl.rewards.choices import LetteredChoice, read_choice, settled
from e3rl.rewards.notation import clean, split_list, squeezed
from e3rl.rewards.quantities import Quantity, read_quantity, same_number
from e3rl.rewards.units import units_conflict


def by_choice(gold: str, answer: str) -> bool | None:
    """If the reference is a choice: (A) is A is 'A. because …'; a choice with its text is also that text."""
    wanted = read_choice(gold)
    if wanted is None:
        return None
    chosen = read_choice(answer)
    if chosen is None:
        return _content_is(wanted.content, answer) if wanted.content else False
    return same_choice(wanted, chosen)


def same_choice(wanted: LetteredChoice, chosen: LetteredChoice) -> bool:
    """One letter, and no text beside it that contradicts the reference's or offers other letters."""
    if wanted.letter != chosen.letter:
        return False
    if wanted.content and chosen.content:
        return _content_is(wanted.content, chosen.content)
    return settled(chosen)


def _content_is(content: str, other: str) -> bool:
    if squeezed(clean(content)).casefold() == squeezed(clean(other)).casefold():
        return True
    left, right = read_quantity(clean(content)), read_quantity(clean(other))
    return (
        left is not None
        and right is not None
        and same_number(left, right)
        and not units_conflict(left.unit, right.unit)
    )


_WRAPPED = re.compile(r"\\text\s*\{([^{}]*)\}")
_WORD = re.compile(r"[A-Za-z][A-Za-z'.-]*")
_NOT_WORDS = re.compile(
    r"\\(?!text|emptyset|infty)|[=<>^_/*+|\d]|\b(?:sin|cos|tan|sec|csc|cot|log|ln|exp|sqrt|pi|arcsin|arccos|arctan|infinity|infty)\b"
)
_EMPTY = frozenset(
    ["no solution", "no solutions", "none", "empty set", "the empty set", "no real solution", "no real solutions"]
)


def _words(text: str) -> str | None:
    r"""Plain text, with case and spaces normalised: a word of four letters, several words, or any in ``\text{…}``."""
    wrapped = _WRAPPED.search(text) is not None
    plain = _WRAPPED.sub(r" \1 ", text)
    plain = plain.strip(" .,;:!?\"'`*()")
    if not plain or _NOT_WORDS.search(plain) or any(c in plain for c in "()[]{}\\"):
        return None
    words = plain.replace(",", " ").split()
    if not all(_WORD.fullmatch(w) for w in words):
        return None
    short = len(words) == 1 and len(words[0]) < 4 and words[0].casefold() not in ("yes", "no", "odd", "red", "dne")
    if short and not wrapped:
        return None
    if len(words) > 1 and len(words[1]) > 1 and words[0].casefold() in ("a", "an", "the"):
        words = words[1:]
    return " ".join(w if len(w) == 1 else w.casefold() for w in words)


def _is_empty(text: str, words: str | None) -> bool:
    """Whether an answer means 'nothing': an empty set, 'no solution'."""
    return squeezed(text) in ("\\emptyset", "\\{\\}") or words in _EMPTY


def by_words(gold: str, answer: str) -> bool | None:
    left, right = _words(gold), _words(answer)
    if _is_empty(gold, left) and _is_empty(answer, right):
        return True
    numbers = [read_quantity(gold) is not None, read_quantity(answer) is not None]
    if all(numbers):
        return None  # number words
    if left is not None and right is not None:
        same = squeezed(left) == squeezed(right)
        return None if not same and len(split_list(gold)) > 1 else same  # a list has no order
    text = left if left is not None else right
    if text is None:
        return None
    return False if any(numbers) or " " in text else None  # one word may still be a product of variables


def by_quantity(gold: str, answer: str) -> bool | None:
    left, right = read_quantity(gold), read_quantity(answer)
    if left is None or right is None or (left.comma and not right.comma):
        return None  # a comma in a reference divides a list
    if same_number(left, right):
        return not units_conflict(left.unit, right.unit)
    return None if _may_be_list(left, right) else False


def _may_be_list(left: Quantity, right: Quantity) -> bool:
    return left.comma and right.comma


_BASE = re.compile(r"\(?([0-9A-Za-z]+)\)?_\s*\{?\s*(?:\\text\s*\{\s*(\w+)\s*\}|(\d+))\s*\}?")
_BASE_WORDS = {
    word: str(n) for n, word in enumerate(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], 2)
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


_PART = re.compile(r"[\d.\\a-z/{} ]*")


def by_colon(gold: str, answer: str) -> bool | None:
    """Ratios and times of day, part by part."""
    left, right = (re.split(r"\s*:\s*", text.rpartition("=")[2].strip().casefold()) for text in (gold, answer))
    if not all(_PART.fullmatch(part) and re.search(r"\d", part) for part in (*left, *right)):
        return None
    if len(left) > 1 and len(right) > 1:
        return list(map(squeezed, left)) == list(map(squeezed, right))
    one, other = (left, answer) if len(left) > 1 else (right, gold)
    return False if len(one) > 1 and read_quantity(other) else None


RULES = (by_choice, by_words, by_quantity, by_base, by_colon)
"""In the order of evaluation."""
