r"""Finding the final answer in a response or in a reference.

Only the text after ``</think>`` counts. The answer is the first of these that exists: the last ``\boxed{…}``, or several
adjacent ones as a list; the last "answer is …", ``#### …`` (GSM8K) or ``A: …``; the whole text if it isn't prose; the last
formula or number, whichever comes later. A text that retracts its answer, offers several or hedges has no answer.
Time is linear in the length of the text.
"""

from __future__ import annotations

import re
from typing import Literal

from e3rl.rewards.choices import doubtful, taken_back
from e3rl.rewards.notation import BOLD, clean, squeezed, tidied
from e3rl.rewards.quantities import read_quantity

Unboxed = Literal["last", "stated", "none"]
"""What counts without a box: also the last formula or number, only what is stated as the answer, or nothing."""

LONGEST_ANSWER = 2000
"""Longest answer in characters. A longer one is wrong without a check: reference answers are far shorter."""

_LOOK_AHEAD = 2000  # characters after "answer is" that are searched: a longer text is no answer
_LONGEST_WORDS = 100  # characters of an answer in words
_APART = 80  # characters between boxes that form a list

_BOX = re.compile(r"\\(?:boxed|fbox)\s?")
_BARE = re.compile(r"(?:[^\s${}\\.,]|[.,](?=\d)){1,40}")
_MARKERS = re.compile(
    r"(?i:\banswer(?: is| would be| must be)? ?[:=]|\banswer (?:is|would be|must be|equals)\b|\banswer\b\s?(?=\$|\\\(|\\\[)"
    r"|\br[ée]ponse(?: est\b| ?:)|\brespuesta(?: es\b| ?:)|\bantwort(?: ist\b| ?:))|答案 ?(?:是|为|[:：])?"
    r"|####|(?:^|(?<=[;\n])) ?A:(?![A-Z])",
    re.MULTILINE,
)
_SPAN = (
    r"(?:\$\$[^$]{1,600}\$\$|\$(?:\\.|[^$\\\n]|\n(?!\n)){1,600}\$|\\\((?:[^\\]|\\(?![()])){1,600}\\\)"
    r"|\\\[(?:[^\\]|\\(?![\[\]])){1,600}\\\])"
)
_RUN = re.compile(
    rf"{_SPAN}(?:(?:\s?[,;]\s?(?:and|or)?\s?|\s(?:and|or)\s){_SPAN}){{0,20}}(?:\s?(?:\\?%|percent\b|pct\b))?", re.DOTALL
)
_NUMBER = re.compile(
    r"(?<!\S)[-+\w(^.*/]{0,40}\\(?:[dt]?frac|sqrt|pi|infty)(?:[^\s$.,;]|[.,](?=\d)){0,200}"
    r"|-?\\[dt]?frac\s?\{[^{}]{0,80}\}\s?\{[^{}]{0,80}\}"
    r"|(?<![A-Za-z0-9_.])(?:(?<!\d)[-+−])?\s?[$€£]?(?:\d{1,400}(?:,\d{1,400}){0,40}|(?=\.\d))(?:\.\d{1,400})?(?:/\d{1,400})?(?:\s?\\?%)?"
    r"(?![A-Za-z_]\w{0,40}\d)"
)
_WORD = re.compile(r"(?<![\\{A-Za-z_^+*/=(|-])(?:[A-Za-z]{3,}|so|is|of|to|it|he|we|by|an|as|be)(?![A-Za-z(_^+*/=}|])")
_FOREIGN = re.compile(r"[\u0590-\u08ff\u0900-\u0dff\u0e00-\u0eff\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]")
_MATH_WORDS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "sec",
        "csc",
        "cot",
        "log",
        "exp",
        "sqrt",
        "and",
        "infinity",
        "infty",
        "mod",
        "percent",
        "pct",
        "arcsin",
        "arccos",
        "arctan",
        "max",
        "min",
        "gcd",
        "lcm",
        "deg",
        "frac",
    ]
)
_SENTENCE_END = re.compile(r"[.;](?:\s|$)|。|\n")
_REASON = re.compile(
    r",?\s(?:because|since|which|where|as|so)\s|,\s(?=(?:it|this|that|they|we|he|she|I|not|the)\b)|\s\(because"
)
_FILLER = re.compile(
    r"(?:(?:is|are|was|therefore|thus|simply|just|exactly|equal to|equals|that|indeed|approximately)\b[\s:,]{0,3}){0,4}",
    re.I,
)
_CHANGED = re.compile(
    r"[\s-]?(?:\(?(?:squared|cubed|factorial|tenths?|halves|half|thirds?|quarters?|ninths|twelfths|hundredths?|thousandths?"
    r"|[a-z]{3,}ths|pairs?|couples?|ppm|ppb|percent|per cent|dozens?|hundreds?|thousands?|[mbtr]+illions?|times|divided"
    r"|multiplied|plus|minus|over|mod|modulo|choose|raised|to the|root|point|wrong|incorrect|or|light"
    r"|doubled|tripled|halved|negated|below zero|and (?:a|one) (?:half|third|quarter)|(?:in )?base"
    r"|(?:more|less|fewer|greater|smaller) than|is (?:wrong|incorrect|not))\b|\\(?![)\]])|[!^*/+=<>×÷]|\s[-–−]\s"
    r"|,?\s?\(?(?:\?|(?:i guess|i think|not sure|probably)\b))",
    re.I,
)
"""Text after a number that changes or retracts it."""
_BEFORE = re.compile(
    r"\b(?:minus|negative|twice|thrice|double|triple|half|at (?:least|most)|up to|nearly|almost|barely|hardly|rarely|seldom"
    r"|(?:anything|all) but|far from|short of|close to|(?:more|less|fewer|greater|smaller|larger|other) than"
    r"|above|below|over|under|beyond|(?:squares?|cubes?|roots?|half|third|quarter|tenth|percent|powers?|log|logarithm|opposite"
    r"|inverse|reciprocal|negation|negative|factorial|complement|multiples?|factors?|divisors?) (?:of|to))"
    r" (?:the (?:number|value) )?\$?$",
    re.I,
)
"""Words before a number that make it another one, or a bound."""
_NEGATIVE = re.compile(r"(?:minus|negative) (\$?)(?=\d)", re.I)
_PART = re.compile(r"[*/^+×÷<>-] ?$|(?:^|[a-z:] )\d[\d.,]{0,40} ?= ?$")
"""Text before a number that makes it part of an expression."""
_LISTED = re.compile(r"\s?(?:,|;|,? ?\b(?:and|or)\b|/)\s?\$?")


def last_box(text: str) -> str | None:
    r"""The content of the last ``\boxed{…}`` or ``\fbox{…}``; None if there is none or the last is never closed."""
    boxes = list(_BOX.finditer(text))
    found = _box_at(text, boxes[-1].end()) if boxes else None
    return found[0] if found else None


_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def _box_at(text: str, start: int) -> tuple[str, int] | None:
    """The content of the box whose braces begin at ``start``, and where it ends."""
    start += len(text[start : start + 200]) - len(text[start : start + 200].lstrip())
    if not text.startswith("{", start):  # TeX takes the next token: \boxed 5
        bare = _BARE.match(text, start)
        return (bare[0], bare.end()) if bare else None
    depth = 0
    for brace in _BRACE.finditer(text, start):
        if brace[0] in "{}":
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                content = text[start + 1 : brace.start()].strip()
                return (content, brace.end()) if content else None
    return None


_BETWEEN = re.compile(r"\\text ?\{([^{}]*)\}|\\(?:quad|qquad|[,;:! ()\[\]])|[$&]")
_CONNECTED = re.compile(r"[,;]?(?:(?:[\w()]{1,20} ){0,3}(?:and|or))? ?(?:[A-Za-z]\w{0,3} ?=)?", re.IGNORECASE)


def _connects(between: str) -> bool:
    """Whether the text between two boxes is only a comma, 'and', 'or', or the name of a value."""
    if len(between) > _APART:
        return False
    plain = _BETWEEN.sub(lambda m: f" {m[1] or ''} ", between)
    if not plain.strip() and "\n" in between:
        return False
    return _CONNECTED.fullmatch(re.sub(r"\s*([,;=])\s*", r"\1", " ".join(plain.strip(".").split()))) is not None


def boxed_answer(text: str) -> str | None:
    """The last box; with earlier boxes, as a list, if only 'and', 'or' or a comma is between them."""
    starts = list(_BOX.finditer(text))
    last = _box_at(text, starts[-1].end()) if starts else None
    if last is None:
        return None
    found, begins = [last[0]], starts[-1].start()
    for box in reversed(starts[-20:-1]):
        earlier = _box_at(text[:begins], box.end())
        if earlier is None or not _connects(text[earlier[1] : begins]):
            break
        found.append(earlier[0])
        begins = box.start()
    return ", ".join(reversed(found)) if len(set(found)) > 1 else last[0]


def response_of(text: str) -> str | None:
    """A response without its thinking: the text after the last ``</think>``; None if thinking never ended."""
    _, closed, rest = text.rpartition("</think>")
    if closed:
        return rest
    return None if "<think>" in text else text


def after_marker(text: str) -> str | None:
    """The text after the last "answer is", "####" or similar marker; None without one."""
    markers = list(_MARKERS.finditer(text))
    if not markers:
        return None
    start = markers[-1].end()
    return text[start : start + _LOOK_AHEAD].replace("**", " ").strip().lstrip(":*_ \n")


_FINAL = re.compile(r"\bfinal answer ?(?:is\b|:)(?!\s?\W{0,3}\\\\?boxed)", re.IGNORECASE)


def _stated_after_box(text: str) -> bool:
    """Whether a 'final answer is' comes after the last box: the box held an intermediate result."""
    last = [*_BOX.finditer(text)][-1]
    box = _box_at(text, last.end())
    return box is not None and _FINAL.search(text, box[1]) is not None


def extract_answer(text: str, unboxed: Unboxed = "last") -> str | None:
    r"""The final answer of a response, or None. A last ``\boxed`` that is never closed counts as no answer."""
    said = response_of(tidied(text))
    if said is None:
        return None
    if _BOX.search(said) and not _stated_after_box(said):
        return boxed_answer(said)
    if unboxed == "none":
        return None
    marked = after_marker(said)
    if marked is not None:
        return None if taken_back(marked) else _beginning(marked)
    if not is_prose(said):
        return said.strip() or None
    return _last_mathematics(BOLD.sub(r"\1", said)) if unboxed == "last" else None


def _beginning(text: str) -> str | None:
    """The answer at the start of the text after "answer is"; the whole sentence if it hedges or denies."""
    said = _FILLER.match(text).end()  # type: ignore[union-attr]
    if sign := _NEGATIVE.match(text, said):
        text = f"{text[:said]}{sign[1]}-{text[sign.end() :]}"
    run = _RUN.search(text)
    whole = _SENTENCE_END.split(text, maxsplit=1)[0].strip()
    sentence = _REASON.split(whole, maxsplit=1)[0].strip()
    sentence = sentence[_FILLER.match(sentence).end() :].strip()  # type: ignore[union-attr]
    if doubtful(sentence):
        return whole.rstrip(".,;:").strip()
    if run and run.start() < 60 and not re.search(r"\d|\n|[.;]\s", text[: run.start()]):
        tail = _REASON.split(_SENTENCE_END.split(text[run.end() :], maxsplit=1)[0], maxsplit=1)[0]
        if _CHANGED.match(tail) or _BEFORE.search(text[: run.start()]):
            return whole
        return _last_mathematics(sentence) if re.search(r"\d|\$", tail) else run[0].strip()
    sentence = sentence.rstrip(".,;:").strip()
    if not sentence:
        return None
    if len(sentence) > _LONGEST_WORDS or (is_prose(sentence) and re.search(r"\d", sentence)):
        if re.search(r"\bbetween\b", sentence):
            return sentence
        leading = _NUMBER.match(sentence)
        if leading and re.match(r"\s|$", sentence[leading.end() :]):
            return sentence if _CHANGED.match(sentence, leading.end()) else leading[0].strip()
        return _last_mathematics(sentence)
    return sentence


_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf|operatorname) ?\{[^{}]*\}")


_MEASURED = re.compile(r"\s?[-+]?\d[\d,.]{0,40}(?: [A-Za-z]{2,20}){1,2}\.?\s?")


def is_prose(text: str) -> bool:
    """Whether the answer must be searched for in the text: it has words besides mathematics, and is no plain quantity."""
    if len(text) > 2000:
        return True
    words = [w for w in _WORD.findall(_TEXT.sub(" ", text)) if w not in _MATH_WORDS] + _FOREIGN.findall(text)
    if not words or _MEASURED.fullmatch(text) or read_quantity(clean(text)) is not None:
        return False
    return bool(re.search(r"\d|\$|\\[(\[]", text)) or len(text) > _LONGEST_WORDS


def _last_mathematics(text: str) -> str | None:
    """The last formula or the last number, whichever comes later; None if the text around it changes or denies it."""
    text = text[-_LOOK_AHEAD:]
    spans = [m for m in _RUN.finditer(text) if "\\" in m[0] or not is_prose(m[0].strip("$ "))]
    numbers = [m for m in _NUMBER.finditer(text) if re.search(r"\d", m[0])]
    formula = bool(spans) and (not numbers or numbers[-1].start() < spans[-1].end())
    if not spans and not numbers:
        return None
    chosen = spans if formula else numbers
    first = len(chosen) - 1
    while first and _LISTED.fullmatch(text[chosen[first - 1].end() : chosen[first].start()]):
        first -= 1
    start, end = chosen[first].start(), chosen[-1].end()
    clause = re.split(r"[.;:!?,]\s|\n", text[max(0, start - 60) : start])[-1]
    if (
        doubtful(clause)
        or _CHANGED.match(text, end)
        or (not formula and _PART.search(clause))
        or _BEFORE.search(clause)
    ):
        return None
    if re.match(r"[-+−]\s", text[start : start + 2]) or (text[start] in "-+−" and re.search(r"[\w)}]$", clause)):
        return None
    return text[start:end].strip()


def normalize(answer: str) -> str:
    """An answer without its typography. Equal results are equal answers; different results may be equal answers too."""
    return squeezed(clean(answer))


_SHORT = 10**40


def vote(answer: str) -> str:
    """The key of an answer in a majority vote. A number's key is its value, whatever its unit and spelling."""
    quantity = read_quantity(clean(answer))
    if quantity is None or max(abs(quantity.value.numerator), quantity.value.denominator) > _SHORT:
        return normalize(answer)
    return f"{quantity.value}%" if quantity.percent else str(quantity.value)
