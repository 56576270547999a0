r"""Units after a number: which words are units, and when two of them differ. A word that is not listed is no unit."""

from __future__ import annotations

import re

_NAMES = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "dm": "decimeter decimetre", "m": "meter metre",
    "km": "kilometer kilometre", "nm": "nanometer nanometre", "in": "inch inche", "ft": "foot feet", "yd": "yard",
    "mi": "mile", "acre": "", "hectare": "", "mg": "milligram", "g": "gram", "kg": "kilogram", "lb": "pound", "oz": "ounce",
    "ton": "tonne", "ms": "millisecond", "ns": "nanosecond", "s": "sec second", "min": "minute", "h": "hr hour", "day": "",
    "week": "wk", "month": "", "year": "yr", "decade": "", "mL": "ml milliliter millilitre", "L": "l liter litre",
    "gal": "gallon", "quart": "", "pint": "", "cup": "", "dollar": "usd buck", "cent": "", "euro": "eur", "yen": "jpy",
    "sterling": "gbp", "yuan": "rmb", "rupee": "", "degree": "deg", "radian": "rad", "unit": "", "C": "celsius",
    "F": "fahrenheit", "K": "kelvin", "N": "newton", "kN": "", "J": "joule", "kJ": "kilojoule", "W": "watt",
    "kW": "kilowatt", "MW": "", "V": "volt", "mV": "", "A": "ampere amp", "mA": "", "Hz": "hertz", "kHz": "",
    "MHz": "", "GHz": "",
    "Pa": "pascal", "kPa": "", "MPa": "", "atm": "", "mol": "mole", "eV": "", "keV": "", "MeV": "", "GeV": "", "erg": "ergs",
    "T": "tesla", "am": "a.m.", "pm": "p.m.", "AU": "", "pc": "parsec", "Mpc": "", "kpc": "", "\\AA": "angstrom Å",
    "cal": "calorie",
    "kcal": "kilocalorie", "bit": "", "byte": "",
}  # fmt: skip
_ABBREVIATIONS = {unit: unit for unit in _NAMES}
_LONG = {
    name.lower(): unit
    for unit, names in _NAMES.items()
    for name in (*names.split(), *([unit] if len(unit) > 1 else []))
}
_CLASHES = {"mw", "ma", "mv", "mpc", "mhz", "mpa"}  # milli or mega: capitals decide

_COUNTED = """
    apple orange banana egg cookie cake cupcake muffin pie pizza slice piece candy chocolate donut sandwich burger berry
    strawberry cherry peach pear lemon tomato potato carrot pumpkin melon watermelon grape nut flower rose tulip tree plant
    seed leaf bush petal bird fish dog cat puppy kitten horse cow sheep pig chicken duck goose animal frog bee spider insect
    turtle rabbit lion snake monkey bear person people child children kid boy girl man men woman women student teacher
    friend player member adult guest customer worker employee passenger participant family book page chapter word letter
    digit problem question answer test point mark goal run game match card stamp coin penny nickel dime marble ball
    balloon bead toy doll block brick box bag basket bottle jar can carton glass plate bowl spoon fork gift pack
    package ticket picture photo painting poster sticker pencil pen crayon marker paper sheet notebook eraser shirt shoe sock
    hat dress button car bus truck bike bicycle boat plane train ship wheel trip ride house room floor window door desk
    table chair seat row column stair step class school team group shelf way value solution integer number edge vertex
    vertices side face diagonal triangle square rectangle circle polygon cube angle line segment path root
    subset set permutation combination arrangement outcome element term factor divisor multiple prime zero intersection
    region sequence tuple function string code message song movie video call hit vote job task machine phone computer
    bracelet necklace ring pillow blanket bed lamp candle fruit vegetable meal snack drink juice soda stone rock shell star
    planet crate barrel bucket lap stick post nail wall tile lollipop gumball peanut pancake waffle cracker time
"""
"""Countable things. Words that change a number, such as pair, score, half or tenth, are not included."""

_NOUNS = frozenset(_COUNTED.split())
_ADJECTIVES = frozenset(["distinct", "different", "possible", "total"])
_NEUTRAL = {"unit"}
"""Units without meaning: a number with one of them equals the bare number."""

_TOKEN = re.compile(r"[A-Za-zµÅ]+|\\AA|\^ ?\{? ?-?\d ?\}?|[/*·]|\\cdot|[ .~-]|(?P<bad>.)", re.DOTALL)
_TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
_SYMBOLS = {"€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee", "¤": "dollar"}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_SPEEDS = {"mph": ("mi", "h"), "kph": ("km", "h"), "kmph": ("km", "h")}
_LONGEST = 60


def _unit_word(word: str) -> str | None:
    """A word's unit, in one spelling; None for any other word."""
    if word in _ABBREVIATIONS:
        return word
    lower = word.lower()
    if lower in _CLASHES:
        return None
    for form in (lower, lower[:-1] if lower.endswith("s") else ""):
        if form in _LONG:
            return _LONG[form]
    for ending, instead in (("", ""), ("s", ""), ("es", ""), ("ies", "y"), ("ves", "f")):
        if lower.endswith(ending) and lower.removesuffix(ending) + instead in _NOUNS:
            return "#" + lower.removesuffix(ending) + instead
    return None


def read_unit(rest: str) -> str | None:
    """The unit that follows a number, in one spelling; '' for none, None where what follows is no unit."""
    text = rest.strip()
    if not text:
        return ""
    if text in _SYMBOLS:
        return _SYMBOLS[text]
    if text.startswith("^\\circ"):
        scale = _TEXT.sub(r"\1", text.removeprefix("^\\circ")).strip()
        return scale if scale in ("C", "F") else "degree" if not scale else None
    if len(text) > _LONGEST or not (text.startswith("\\text") or _plausible(rest)):
        return None
    return _canonical(_TEXT.sub(r" \1 ", text).strip())


def _plausible(rest: str) -> bool:
    """Whether plain letters after a number may be a unit: longer than one letter, or after a space; s^2 is a variable's."""
    first = re.match(r"[A-Za-zµÅ]+|\\AA", rest.strip())
    if first is None or (len(first[0]) == 1 and "^" in rest and first[0] != "m"):
        return False
    return rest[0] == " " or len(first[0]) > 1


def _canonical(text: str) -> str | None:
    """``cm^2`` for 'sq. cm', 'square centimeters' and 'cm squared'; ``m*s^-1`` for 'meters per second'."""
    powers: dict[str, int] = {}
    last, sign, pending = "", 1, 1
    text = text.replace("a.m", "am").replace("p.m", "pm")
    for token in _TOKEN.finditer(text):
        word = token[0]
        if token["bad"]:
            return None
        lower = word.lower()
        if lower in ("per", "/"):
            sign = -1
        elif lower in _POWERS:
            pending = _POWERS[lower]
        elif last and (word[0] == "^" or lower in ("squared", "cubed")):
            if abs(powers[last]) != 1:
                return None
            powers[last] *= int(re.sub(r"[^-\d]", "", word)) if word[0] == "^" else 2 if lower == "squared" else 3
        elif lower in _SPEEDS:
            above, below = _SPEEDS[lower]
            powers |= {above: 1, below: -1}
        elif word[0].isalpha() or word == "\\AA":
            if lower in _ADJECTIVES:
                continue
            unit = _unit_word(word)
            if unit is None:
                return None
            powers[unit] = powers.get(unit, 0) + sign * pending
            last, sign, pending = unit, 1, 1
    if not powers and pending == 2:
        return None
    if "ft" in powers and "lb" in powers and "-" in text:
        return "ft*lb"
    return "*".join(u if p == 1 else f"{u}^{p}" for u, p in sorted(powers.items())) or None


def units_conflict(left: str | None, right: str | None) -> bool:
    """Whether two units differ: 14 cm is not 14 m, 6 apples are not 6 oranges. A missing unit fits any.

    'Units' fit any, too, where their power is the same: 14 units are 14 cm, but not 14 square units.
    """
    if not left or not right or left == right:
        return False
    if {left, right} in ({"degree", "C"}, {"degree", "F"}):
        return False
    (name, power), (other, other_power) = left.partition("^")[::2], right.partition("^")[::2]
    return (name not in _NEUTRAL and other not in _NEUTRAL) or power != other_power
