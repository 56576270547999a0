r"""Units behind a number: which words are one, and when two of them differ. Anything in ``\text{…}`` may be a unit."""

from __future__ import annotations

import re

_NAMES = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "dm": "decimeter", "m": "meter metre",
    "km": "kilometer kilometre", "nm": "nanometer", "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "acre": "",
    "mg": "milligram", "g": "gram", "kg": "kilogram", "lb": "pound", "oz": "ounce", "ton": "tonne",
    "ms": "millisecond", "s": "sec second", "min": "minute", "h": "hr hour", "day": "", "week": "wk", "month": "", "year": "yr",
    "ml": "milliliter millilitre", "l": "liter litre", "gal": "gallon",
    "dollar": "usd buck", "cent": "", "euro": "eur", "yen": "jpy", "sterling": "gbp", "yuan": "rmb", "rupee": "rs",
    "degree": "deg", "radian": "rad", "unit": "", "c": "celsius", "f": "fahrenheit", "k": "kelvin",
    "n": "newton", "j": "joule", "kj": "kilojoule", "w": "watt", "kw": "kilowatt", "v": "volt", "a": "ampere amp",
    "hz": "hertz", "pa": "pascal", "mol": "mole", "ev": "", "mev": "", "erg": "",
}  # fmt: skip
_CANONICAL = {name: unit for unit, names in _NAMES.items() for name in (unit, *names.split())}
_NEUTRAL = {"unit", "degree"}
"""Units that say nothing: a number with one is the number."""

_WORD = r"[A-Za-zµÅ]+\.?"
_POWER = r"(?:\s*\^\s*\{?\s*-?\d\s*\}?)?"
_TERM = rf"(?:{_WORD}{_POWER})"
_UNIT = re.compile(rf"{_TERM}(?:\s*(?:[/*·]|\\cdot|\s|-)\s*{_TERM})*")
_NO_UNITS = re.compile(
    r"\b(?:and|or|over|times|plus|minus|pi|half|third|quarter|sqrt|mod|not|but|if|where|when|is|are|to|am|pm|[mbtr]+illion"
    r"|dozen|hundred|thousand)s?\b",
    re.IGNORECASE,
)


def read_unit(rest: str) -> str | None:
    """The unit that follows a number, in one spelling; '' for none, None where what follows is no unit."""
    text = rest.strip()
    if not text:
        return ""
    wrapped = re.fullmatch(r"\\text\s*\{([^{}]*)\}\s*(\^\s*\{?\s*\d\s*\}?)?\.?", text)
    inside = re.fullmatch(r"((?:\\text\s*\{[^{}]*\}|[\s/^{}\d-]|\\cdot)+)", text) if not wrapped else None
    if wrapped:
        text = (wrapped[1] + (wrapped[2] or "")).strip()
    elif inside:
        text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip()
    elif text.startswith("^\\circ"):
        scale = text.removeprefix("^\\circ").strip()
        return scale.lower() if scale in ("C", "F") else "degree" if not scale else None
    elif text in ("€", "£", "¥", "₹", "¤"):
        return {"€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee", "¤": "dollar"}[text]
    elif not _plausible(rest):
        return None
    if _NO_UNITS.search(text):
        return None
    return _canonical(text) if _UNIT.fullmatch(text.rstrip(".")) or wrapped else None


def _plausible(rest: str) -> bool:
    """Whether plain letters behind a number are a unit: a known one, or words after a space; never one unknown letter."""
    text = rest.strip()
    first = re.match(_WORD, text)
    if first is None:
        return False
    word = first[0].rstrip(".")
    known = _singular(word) in _CANONICAL
    if rest[0] == " ":
        return len(word) > 1 or known
    return known and (len(word) > 1 or "^" in text)


def _singular(word: str) -> str:
    lower = word.lower().rstrip(".")
    if lower in _CANONICAL:
        return lower
    return lower[:-1] if lower.endswith("s") and lower[:-1] in _CANONICAL else lower


def _canonical(text: str) -> str:
    """``cm^2`` for 'sq. cm', 'square centimeters' and 'cm squared'; ``m/s`` for 'meters per second'."""
    text = re.sub(r"\s*\bper\b\s*", "/", text.lower())
    text = re.sub(r"\b(mph|kph|kmph)\b", lambda m: {"mph": "mi/h"}.get(m[1], "km/h"), text)
    text = re.sub(r"\b(?:square|sq)\b\.?\s*([a-z]+)\.?", r"\1^2", text)
    text = re.sub(r"\bcubic\s*([a-z]+)", r"\1^3", text)
    text = re.sub(r"([a-z]+)\s+squared\b", r"\1^2", text)
    text = re.sub(r"([a-z]+)\s+cubed\b", r"\1^3", text)
    text = re.sub(r"\^\s*\{?\s*(-?\d)\s*\}?", r"^\1", text)
    return re.sub(r"[a-z]+\.?", lambda m: _CANONICAL.get(_singular(m[0]), m[0].rstrip(".")), text).replace(" ", "")


def _known(unit: str) -> bool:
    return all(word in _NAMES for word in re.findall(r"[a-z]+", unit))


def units_conflict(left: str | None, right: str | None) -> bool:
    """Whether two units are both known and different: 14 cm is not 14 m. A missing or unknown unit fits any."""
    if not left or not right or left == right or left in _NEUTRAL or right in _NEUTRAL:
        return False
    return _known(left) and _known(right)
