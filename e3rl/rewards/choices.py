r"""Answers to multiple-choice questions: ``A``, ``(A)``, ``\text{(A)}``, ``A. 12``, 'Option A'."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LETTER = "A-J"
_LEADING = re.compile(
    rf"(?:(?:option|choice|answer) )?(?:\\text ?\{{ ?)?(?:\( ?([{_LETTER}a-j]) ?\)|([{_LETTER}])(?= ?(?:[.:)]|\}}|$)))"
    r" ?[.:)]? ?\}? ?[.:)]?",
    re.IGNORECASE,
)
_STANDALONE = re.compile(rf"(?<![A-Za-z0-9\\'{{(_^=+*/-])\(?([{_LETTER}])\)?(?![A-Za-z0-9'(_^=+*/])")
_CLAUSE = re.compile(
    r"[.;!?]\s|[.!?]$|\n|,\s+(?=(?:so|since|because|as|but|hence|thus|therefore|the|it|which|and (?:so|thus|hence))\b)"
)
_BECAUSE = re.compile(
    r"[,.;]?\s+(?:because|since|as|for|which|where|so)\s|,\s+(?:not|it|this|the|we|he|she|they)\b|\n|\.\s"
)
_CONNECTED = re.compile(r"[\s,;/&()*]{0,10}(?:\b(?:or|and)\b)?[\s,;/&()*]{0,10}")
_DOUBT = re.compile(
    r"\b(?:(?i:not|isn't|wait|maybe|perhaps|possibly|either|neither|wrong|incorrect|actually|instead|rather|unsure|might|could"
    r"|cannot|can't|eliminate|rule out|except|unless)|[Nn]or?)\b"
)


@dataclass(frozen=True)
class LetteredChoice:
    """A letter and the text beside it."""

    letter: str
    content: str = ""


def doubtful(text: str) -> bool:
    """Whether a text retracts or hedges its statement."""
    return _DOUBT.search(text) is not None


def read_choice(text: str) -> LetteredChoice | None:
    """An answer as a choice; None if it is something else. A single letter is a choice."""
    text = text.strip().strip("*").strip()
    found = _LEADING.match(text)
    if found is None or (found[1] is None and found[2].islower()):
        return None
    content = text[found.end() :].strip().removesuffix("}").strip(" .")
    if re.match(r"(?:\\text ?\{ ?)?(?:or|and)\b|[,/&]", content):
        return None
    if content.startswith(
        ("=", "+", "-", "*", "/", "^", "_", "<", ">", "\\cup", "\\cap", "\\le", "\\ge", "\\in", "\\to")
    ):
        return None
    return LetteredChoice((found[1] or found[2]).upper(), content)


def settled(choice: LetteredChoice) -> bool:
    """Whether the text beside a letter neither retracts it nor names another one."""
    return not doubtful(choice.content) and {choice.letter} >= {m[1] for m in _letters(choice.content)}


def stated_choice(text: str) -> LetteredChoice | None:
    """The choice in a statement, such as the text after 'answer is'; None if it names several or retracts one."""
    text = _BECAUSE.split(text.strip().lstrip("*:").strip() + " ", maxsplit=1)[0].replace("**", "").strip()
    first = read_choice(text)
    if doubtful(text) and first is None:
        return None
    if first is not None:
        return first if settled(first) else None
    letters = _letters(text)
    return LetteredChoice(letters[0][1]) if len({m[1] for m in letters}) == 1 else None


def last_choice(text: str) -> LetteredChoice | None:
    """The choice at the end of running text; None if its last clause with a letter offers several or denies it."""
    text = text.replace("**", "").strip()
    first = read_choice(text)
    if first is not None:
        return first if settled(first) else None
    for clause in reversed(_CLAUSE.split(text)[-40:]):
        letters = _letters(clause)
        if letters:
            return _last_of(clause, letters)
    return None


def _last_of(clause: str, letters: list[re.Match[str]]) -> LetteredChoice | None:
    """The last letter of a clause, unless it is in a list of letters or denied."""
    last = letters[-1]
    before = letters[-2] if len(letters) > 1 else None
    if before is not None and before[1] != last[1] and _CONNECTED.fullmatch(clause[before.end() : last.start()]):
        return None
    start = before.end() if before is not None else 0
    return None if doubtful(clause[start:]) else LetteredChoice(last[1].upper())


def _letters(text: str) -> list[re.Match[str]]:
    """Letters that stand for a choice: 'A' before a word is an article, and 'I' is a pronoun, unless in brackets."""
    return [m for m in _STANDALONE.finditer(text) if m[0].startswith("(") or not _is_article(m, text)]


def _is_article(found: re.Match[str], text: str) -> bool:
    return found[1] == "I" or (found[1] == "A" and re.match(r" [a-z]", text[found.end() : found.end() + 2]) is not None)
