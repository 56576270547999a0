r"""Finding the final answer in a response or in a reference.

The conventions are the field's: what follows ``</think>`` counts; there the last ``\boxed{…}``, or several that stand
together as a list; without one, the last "answer is …", ``#### …`` (GSM8K) or ``A: …``; failing these, the whole text
where it is no prose, else its last formula or number, whichever comes later.
"""

from __future__ import annotations

import re

from e3rl.rewards.notation import clean, squeezed
from e3rl.rewards.quantities import read_quantity

_LOOK_AHEAD = 4000  # characters after "answer is" that are searched: what is longer is no answer
_LONGEST_WORDS = 100  # characters of an answer in words

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BARE = re.compile(r"[^\s${}\\.,]+")
_MARKERS = re.compile(
    r"(?i:\banswer(?:\s+is|\s+would\s+be|\s+must\s+be)?\s*[:=]|\banswer\s+(?:is|would\s+be|must\s+be|equals)\b|\banswer\b\s*(?=\$|\\\(|\\\[)"
    r"|\br[ée]ponse(?:\s+est\b|\s*:)|\brespuesta(?:\s+es\b|\s*:)|\bantwort(?:\s+ist\b|\s*:))|答案\s*(?:是|为|[:：])?"
    r"|####|(?:^|(?<=[;\n]))[ \t]{0,20}A:",
    re.MULTILINE,
)
_SPAN = (
    r"(?:\$\$[^$]{1,600}\$\$|\$(?:\\.|[^$\\\n]){1,600}\$|\\\((?:[^\\]|\\(?![()])){1,600}\\\)"
    r"|\\\[(?:[^\\]|\\(?![\[\]])){1,600}\\\])"
)
_RUN = re.compile(
    rf"{_SPAN}(?:(?:\s*[,;]\s*(?:and|or)?\s*|\s+(?:and|or)\s+){_SPAN})*(?:\s*(?:\\?%|percent\b|pct\b))?", re.DOTALL
)
_NUMBER = re.compile(
    r"(?<!\S)[-+\w(^.*/]{0,40}\\(?:[dt]?frac|sqrt|pi|infty)(?:[^\s$.,;]|[.,](?=\d)){0,200}|-?\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\}|(?<![A-Za-z0-9_.])(?:(?<!\d)[-+−])?\s?[$€£]?(?:\d+(?:,\d+)*|(?=\.\d))(?:\.\d+)?(?:/\d+)?(?:\s?\\?%)?(?![A-Za-z_]{1}\w*\d)"
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
_SENTENCE_END = re.compile(r"(?<!\d)[.;](?:\s|$)|(?<=\d)[.;](?:\s|$)|。|\n")
_REASON = re.compile(
    r",?\s+(?:because|since|which|where|as|so)\s|,\s+(?=(?:it|this|that|they|we|he|she|I|not|the)\b)|\s+\(because"
)
_FILLER = re.compile(
    r"^(?:(?:is|are|was|therefore|thus|simply|just|exactly|equal to|equals|that|indeed|approximately)\b[\s:,]*)+", re.I
)


def last_box(text: str) -> str | None:
    r"""What stands in the last ``\boxed{…}`` or ``\fbox{…}``; None where there is none or the last is never closed."""
    boxes = list(_BOX.finditer(text))
    found = _box_at(text, boxes[-1].end()) if boxes else None
    return found[0] if found else None


def _box_at(text: str, start: int) -> tuple[str, int] | None:
    """The content of the box whose braces begin at ``start``, and where it ends."""
    if not text.startswith("{", start):  # TeX takes the next token: \boxed 5
        bare = _BARE.match(text, start)
        return (bare[0], bare.end()) if bare else None
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
                content = text[start + 1 : position].strip()
                return (content, position + 1) if content else None
    return None


_BETWEEN = re.compile(r"\\text\s*\{([^{}]*)\}|\\(?:quad|qquad|[,;:! ()\[\]])|[$&]")
_CONNECTED = re.compile(
    r"\s*(?:[,;]|,?\s*(?:[\w() ]{1,20}\s)?(?:and|or)\b)?\s*(?:[A-Za-z]\w{0,3}\s*=)?\s*", re.IGNORECASE
)


def boxed_answer(text: str) -> str | None:
    """The last box; with those before it where nothing but 'and', 'or' or a comma stands between them, as a list."""
    starts = list(_BOX.finditer(text))
    last = _box_at(text, starts[-1].end()) if starts else None
    if last is None:
        return None
    found, begins = [last[0]], starts[-1].start()
    for box in reversed(starts[-20:-1]):
        earlier = _box_at(text, box.end())
        if earlier is None or earlier[1] > begins:
            break
        between = _BETWEEN.sub(lambda m: f" {m[1] or ''} ", text[earlier[1] : begins])
        if (not between.strip() and "\n" in between) or not _CONNECTED.fullmatch(between.strip(".")):
            break
        found.append(earlier[0])
        begins = box.start()
    return ", ".join(reversed(found)) if len(set(found)) > 1 else last[0]


def response_of(text: str) -> str | None:
    """What a response says after it has thought: behind the last ``</think>``; None where thinking never ended."""
    _, closed, rest = text.rpartition("</think>")
    if closed:
        return rest
    return None if "<think>" in text else text


def after_marker(text: str) -> str | None:
    """What follows the last "answer is", "####" or the like; None without one."""
    markers = list(_MARKERS.finditer(text))
    if not markers:
        return None
    start = markers[-1].end()
    return text[start : start + _LOOK_AHEAD].replace("**", " ").strip().lstrip(":*_ \n")


_FINAL = re.compile(r"\bfinal\s+answer\s*(?:is\b|:)(?!\s*\W*\\\\?boxed)", re.IGNORECASE)


def _stated_after_box(text: str) -> bool:
    """Whether a 'final answer is' comes after the last box: the box held an intermediate result."""
    last = [*_BOX.finditer(text)][-1]
    box = _box_at(text, last.end())
    return box is not None and _FINAL.search(text, box[1]) is not None


def extract_answer(text: str) -> str | None:
    r"""The final answer of a response, or None. A last ``\boxed`` that is never closed is none."""
    said = response_of(text)
    if said is None:
        return None
    if _BOX.search(said) and not _stated_after_box(said):
        return boxed_answer(said)
    marked = after_marker(said)
    if marked is not None:
        return _beginning(marked)
    if not is_prose(said):
        return said.strip() or None
    return _last_mathematics(said)


def _beginning(text: str) -> str | None:
    """The answer at the beginning of what follows "answer is"."""
    run = _RUN.search(text)
    sentence = _FILLER.sub("", _REASON.split(_SENTENCE_END.split(text, maxsplit=1)[0], maxsplit=1)[0].strip()).strip()
    if run and run.start() < 60 and not re.search(r"\d|\n\s*\n|[.;]\s", text[: run.start()]):
        tail = _REASON.split(_SENTENCE_END.split(text[run.end() :], maxsplit=1)[0], maxsplit=1)[0]
        return _last_mathematics(sentence) if re.search(r"\d|\$", tail) else run[0].strip()
    sentence = sentence.rstrip(".,;:").strip()
    if not sentence:
        return None
    if len(sentence) > _LONGEST_WORDS or (is_prose(sentence) and re.search(r"\d", sentence)):
        if re.search(r"\bbetween\b", sentence):
            return sentence
        leading = re.match(rf"{_NUMBER.pattern}(?=\s|$)", sentence)
        return leading[0].strip() if leading else _last_mathematics(sentence)
    return sentence


def is_prose(text: str) -> bool:
    """Whether the answer has to be looked for in the text: it has words besides mathematics, and is no plain quantity."""
    if len(text) > 2000:
        return True
    plain = re.sub(r"\\(?:text|mathrm|mbox|textbf|operatorname)\s*\{[^{}]*\}", " ", text)
    words = [w for w in _WORD.findall(plain) if w not in _MATH_WORDS] + _FOREIGN.findall(plain)
    if not words or read_quantity(clean(text)) is not None:
        return False
    return bool(re.search(r"\d|\$|\\[(\[]", text)) or len(text) > _LONGEST_WORDS


def _last_mathematics(text: str) -> str | None:
    """The last formula or the last number, whichever comes later."""
    text = text[-_LOOK_AHEAD:]
    spans = [m for m in _RUN.finditer(text) if "\\" in m[0] or not is_prose(m[0].strip("$ "))]
    numbers = [m for m in _NUMBER.finditer(text) if re.search(r"\d", m[0])]
    if spans and (not numbers or numbers[-1].start() < spans[-1].end()):
        return spans[-1][0].strip()
    return numbers[-1][0].strip() if numbers else None


def normalize(answer: str) -> str:
    """An answer without what is only typography. Equal results are equal answers; unequal ones may be equal too."""
    return squeezed(clean(answer))


def vote(answer: str) -> str:
    """What an answer counts as where the commonest is wanted: a number is its value, whatever its unit and spelling."""
    quantity = read_quantity(clean(answer))
    if quantity is None:
        return normalize(answer)
    return f"{quantity.value}%" if quantity.percent else str(quantity.value)
