r"""Finding the final answer in a response, and comparing answers as text where no algebra is needed.

The conventions are the field's: the last ``\boxed{…}`` counts; without one, the last "answer is …", ``#### …`` (GSM8K)
or ``A: …``; failing all these, the last number.
"""

from __future__ import annotations

import re

_LOOK_AHEAD = 4000  # characters after "answer is" that are searched: what is longer is no answer

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BARE = re.compile(r"[^\s${}\\.,]+")
_NUMBER = r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)(?:/\d+)?%?"
_MARKERS = re.compile(r"(?i:\banswer(?:\s+is)?\s*[:=]|\banswer\s+is\b)|####|(?:^|(?<=[;\n]))\s*A:", re.MULTILINE)
_MATH_SPAN = re.compile(r"\$\$?(.+?)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_NO_NOUNS = "pi|and|or|over|times|plus|minus|am|pm|percent|dozen|hundred|thousand|[mbtr]+illion|half|third|quarter"
_COUNTED = re.compile(rf"({_NUMBER})(?:\s+(?!(?i:{_NO_NOUNS})s?\b)[A-Za-z]{{2,}})+")
_LAST_NUMBER = re.compile(rf"(?<![\w.]){_NUMBER}(?![\w])")


def last_box(text: str) -> str | None:
    r"""What stands in the last ``\boxed{…}`` or ``\fbox{…}``; None where there is none or the last is never closed."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if not text.startswith("{", start):  # TeX takes the next token: \boxed 5
        bare = _BARE.match(text, start)
        return bare[0] if bare else None
    depth, escaped = 0, False
    for position in range(start, len(text)):
        character = text[position]
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[start + 1 : position].strip() or None
    return None


def extract_answer(text: str) -> str | None:
    r"""The final answer of a response, or None. A response that mentions ``\boxed`` is judged by its last box alone."""
    if _BOX.search(text):
        boxed = last_box(text)
        return boxed and without_count_noun(boxed)
    markers = list(_MARKERS.finditer(text))
    if markers:
        start = markers[-1].end()
        return _after_marker(text[start : start + _LOOK_AHEAD])
    numbers = _LAST_NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _after_marker(rest: str) -> str | None:
    """The answer at the beginning of what follows "answer is"."""
    lines = rest.strip().splitlines()
    line = lines[0].strip().strip("*").strip() if lines else ""
    span = _MATH_SPAN.search(line)
    if span:
        return next(group for group in span.groups() if group).strip() or None
    sentence = re.split(r"[.;](?:\s|$)", line, maxsplit=1)[0].strip().strip("*").rstrip(".,;").strip()
    return without_count_noun(sentence) or None


def without_count_noun(answer: str) -> str:
    """``5`` for ``5 apples``; algebra would read the noun as a product of letters."""
    counted = _COUNTED.fullmatch(answer)
    return counted[1] if counted else answer


_DROPPED = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[,!;: ]|\\displaystyle|\$")
_SPELLINGS = (
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("\\leq", "\\le"),
    ("\\geq", "\\ge"),
    ("\\%", "%"),
    ("−", "-"),
)
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")


def normalize(answer: str) -> str:
    """An answer without what is only typography. Equal results are equal answers; unequal ones may be equal too."""
    text = _DROPPED.sub(" ", answer.strip())
    for spelled, plain in _SPELLINGS:
        text = text.replace(spelled, plain)
    text = _LOOSE_SPACE.sub("", text.strip()).rstrip(".")
    return re.sub(r"\s+", " ", text)


_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")


def as_words(answer: str) -> str | None:
    r"""An answer that is text, case and spaces evened out: four letters or more, or any in ``\text{…}``; else None."""
    inner = _WRAPPED.fullmatch(answer.strip())
    text = (inner[1] if inner else answer).strip()
    if not _WORDS.fullmatch(text) or (inner is None and len(text) < 4):
        return None
    return " ".join(text.casefold().split())


_INTEGER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,100})")


def as_integer(answer: str) -> int | None:
    """The value of a plain whole number such as ``1,000``; None for everything else."""
    text = normalize(answer)
    return int(text.replace(",", "")) if _INTEGER.fullmatch(text) else None


def textual_verdict(gold: str, answer: str) -> bool | None:
    """Whether the answers are equal where text alone tells; None where it takes algebra."""
    if normalize(gold) == normalize(answer):
        return True
    for read in (as_integer, as_words):
        left, right = read(gold), read(answer)
        if left is not None and right is not None:
            return left == right
    return None
