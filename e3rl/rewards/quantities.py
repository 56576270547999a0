r"""Numbers as they are written, read exactly: thousands, decimals, fractions, powers of ten, per cent, money, units."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from e3rl.rewards.notation import CURRENCY, matching, unwrapped
from e3rl.rewards.units import read_unit

SIGNIFICANT = 6
"""Digits that a decimal needs to count as an approximation, such as 0.333333 for 1/3."""

LONGEST = 400
"""Characters of the longest number that is read as one."""

_GROUPED = r"[1-9]\d{0,2}(?:,\d{3})+(?!\d)(?:\.\d+)?|[1-9]\d{0,2}(?: \d{3})+(?!\d)(?:\.\d+)?"
_COMMA = r"\d+,\d+(?![\d,])"
_PLAIN = re.compile(rf"{_GROUPED}|{_COMMA}|\d+\.\d*|\.\d+|\d+")
_FRAC = re.compile(r"\\frac\s*(?:\{\s*([-+]?[\d.,]+)\s*\}|(\d))\s*(?:\{\s*([-+]?[\d.,]+)\s*\}|(\d))")
_MIXED = re.compile(r"(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)")
_EXPONENT = r"10\s*\^\s*(?:\{\s*([-+]?\d{1,4})\s*\}|\(\s*([-+]?\d{1,4})\s*\)|([-+]?\d{1,4}))"
_POWER = re.compile(_EXPONENT)
_TIMES_TEN = re.compile(rf"\s*(?:\\times|\\cdot|\*|x)\s*{_EXPONENT}")
_E = re.compile(r"[eE]([-+]?\d{1,4})(?![\d.])")
_OVER = re.compile(r"\s*/\s*(?=[.\d])")
_SIGN = re.compile(r"[-+]\s*")

_SCALE = re.compile(r"\s*(?:\\text\s*\{\s*)?(hundred|thousand|million|billion|trillion|dozen)\s*\}?(?![A-Za-z])", re.I)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_PERCENT = re.compile(
    r"\s*(?:%|\\text\s*\{\s*(?:%|percent|per cent|pct)\s*\}|(?:percentage|percent|per cent|pct\.?)(?![A-Za-z]))", re.I
)
_CURRENCIES = {CURRENCY: "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee"}


@dataclass(frozen=True)
class Quantity:
    """A number with its unit and form. ``digits``: significant digits if it was written as a decimal, else None."""

    value: Fraction
    digits: int | None = None
    ulp: Fraction = Fraction(0)  # one unit of a decimal's last place
    percent: bool = False
    unit: str | None = None
    comma: bool = False  # read with a comma as the decimal point: it might be a list as well


def _plain(text: str) -> Quantity:
    """Digits with separators of thousands or a decimal comma."""
    grouped = re.fullmatch(_GROUPED, text) is not None
    value = text.replace(",", "").replace(" ", "") if grouped else text.replace(",", ".")
    digits = re.sub(r"\D", "", value).lstrip("0")
    fractional = re.search(r"\.\d", value) is not None
    ulp = Fraction(1, 10 ** len(value.partition(".")[2])) if fractional else Fraction(0)
    return Quantity(
        Fraction(value.rstrip(".")), len(digits) if fractional else None, ulp, comma="," in text and not grouped
    )


def _exponent(found: re.Match[str]) -> int:
    return int(next(g for g in found.groups() if g is not None))


def _unsigned(text: str) -> tuple[Quantity, str] | None:
    if power := _POWER.match(text):
        return Quantity(Fraction(10) ** _exponent(power)), text[power.end() :]
    if mixed := _MIXED.match(text):
        whole, top, bottom = map(int, mixed.groups())
        return (Quantity(whole + Fraction(top, bottom)), text[mixed.end() :]) if bottom else None
    if fraction := _FRAC.match(text):
        top_, bottom_ = (_plain_or_none(g) for g in fraction.groups() if g is not None)
        if top_ is None or not bottom_:
            return None
        return Quantity(top_ / bottom_), text[fraction.end() :]
    plain = _PLAIN.match(text)
    if plain is None:
        return None
    return _with_suffix(_plain(plain[0]), plain[0], text[plain.end() :])


def _plain_or_none(text: str) -> Fraction | None:
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text.lstrip("+"))
    return sign * _plain(digits).value if re.fullmatch(_PLAIN, digits) else None


def _with_suffix(number: Quantity, written: str, rest: str) -> tuple[Quantity, str]:
    """A plain number and what may belong to it: a power of ten, a denominator, a fraction that makes it mixed."""
    if found := _E.match(rest) or _TIMES_TEN.match(rest):
        return Quantity(number.value * Fraction(10) ** _exponent(found)), rest[found.end() :]
    if written.isdigit() and (fraction := _FRAC.match(rest.lstrip())):
        part = _unsigned(rest.lstrip())
        if part is not None and 0 <= part[0].value < 1:
            return Quantity(number.value + part[0].value), rest.lstrip()[fraction.end() :]
    if (over := _OVER.match(rest)) and (below := _PLAIN.match(rest, over.end())):
        divisor = _plain(below[0]).value
        if divisor:
            return Quantity(number.value / divisor), rest[below.end() :]
    return number, rest


def read_number(text: str) -> tuple[Quantity, str] | None:
    """The number at the beginning of ``text``, and the rest; None where there is none."""
    sign = _SIGN.match(text)
    found = _unsigned(text[sign.end() :] if sign else text)
    if found is None or not sign or sign[0][0] == "+":
        return found
    return replace(found[0], value=-found[0].value), found[1]


def read_quantity(text: str) -> Quantity | None:
    """The quantity that cleaned ``text`` is, whole: a number, with currency, scale, per cent or unit; else None."""
    text = unwrapped(text).strip()
    if len(text) > LONGEST:
        return None
    for _ in range(8):
        if not text.startswith("(") or matching(text, 0) != len(text) - 1 or "," in text:
            break
        text = unwrapped(text[1:-1].strip())
    sign, currency = 1, None
    if money := re.match(rf"(-?)\s*([{''.join(_CURRENCIES)}])\s*", text):
        sign, currency, text = -1 if money[1] else 1, _CURRENCIES[money[2]], text[money.end() :]
    found = read_number(text)
    if found is None:
        return _number_word(text)
    quantity, rest = found
    if scale := _SCALE.match(rest):
        factor = _SCALES[scale[1].lower()]
        quantity, rest = (
            replace(quantity, value=quantity.value * factor, ulp=quantity.ulp * factor),
            rest[scale.end() :],
        )
    if percent := _PERCENT.match(rest):
        quantity, rest = replace(quantity, percent=True), rest[percent.end() :]
    unit = read_unit(rest)
    if unit is None:
        return None
    return replace(quantity, value=sign * quantity.value, unit=currency or unit or None)


_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: i for i, word in enumerate(_ONES.split())} | {word: 10 * i for i, word in enumerate(_TENS.split(), 2)}
_ARTICLES = {"a": 1, "an": 1}


def _number_word(text: str) -> Quantity | None:
    """``fifteen``, ``forty-two``, ``one hundred``, ``a dozen``, ``seven days``."""
    words = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).casefold().replace("-", " ").split()
    if not 0 < len(words) <= 5 or not all(w.isalpha() for w in words):
        return None
    counted = 0
    while counted < len(words) and words[counted] in _WORDS:
        counted += 1
    values = [_WORDS[w] for w in words[:counted]]
    if (len(values) == 2 and not (values[0] >= 20 and 0 < values[1] < 10)) or len(values) > 2:
        return None
    rest = words[counted:]
    if not values:
        if len(rest) < 2 or rest[0] not in _ARTICLES or rest[1] not in _SCALES:
            return None
        values, rest = [1], rest[1:]
    value = sum(values)
    if rest and rest[0] in _SCALES:
        value, rest = value * _SCALES[rest[0]], rest[1:]
    unit = read_unit(" " + " ".join(rest)) if rest else ""
    return None if unit is None else Quantity(Fraction(value), unit=unit or None)


def same_number(left: Quantity, right: Quantity) -> bool:
    """Whether two quantities are equal, units aside. With one per cent sign, 35 % is 35 and 0.35."""
    if left.percent == right.percent:
        return _close(left, right)
    percent, other = (left, right) if left.percent else (right, left)
    return _close(percent, other) or _close(replace(percent, value=percent.value / 100, ulp=percent.ulp / 100), other)


def written_for(decimal: Quantity) -> tuple[Fraction, Fraction]:
    """The range of numbers that a decimal may approximate, by rounding or by truncation."""
    half = decimal.ulp / 2
    if decimal.value < 0:
        return decimal.value - decimal.ulp, decimal.value + half
    return decimal.value - half, decimal.value + decimal.ulp


def _close(left: Quantity, right: Quantity) -> bool:
    """Exact equality, unless one is a decimal with enough digits to be the other one rounded or truncated."""
    if left.value == right.value:
        return True
    if left.digits is not None and left.digits == right.digits:
        return False
    decimals = sorted((q for q in (left, right) if q.digits is not None), key=lambda q: q.digits or 0)
    if not decimals or (decimals[0].digits or 0) < SIGNIFICANT:
        return False
    other = right if decimals[0] is left else left
    low, high = written_for(decimals[0])
    if other.digits is not None:  # of two decimals the shorter one is rounded, not cut off
        low, high = decimals[0].value - decimals[0].ulp / 2, decimals[0].value + decimals[0].ulp / 2
    return low < other.value < high
