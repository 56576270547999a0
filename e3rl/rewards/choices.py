r"""Answers to multiple-choice questions: ``A``, ``(A)``, ``\text{(A)}``, ``A. 12``, 'Option A'."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LETTER = "A-J"
_LEADING = re.compile(
    rf"(?:(?:option|choice|answer)\s+)?(?:\\text\s*\{{\s*)?(?:\(\s*([{_LETTER}a-j])\s*\)|([{_LETTER}])(?=\s*(?:[.:)]|\}}|$)))"
    r"\s*[.:)]?\s*\}?\s*[.:)]?\s*(.*?)\s*\}?$",
    re.IGNORECASE | re.DOTALL,
)
_SPOKEN = re.compile(rf"(?:option|choice)\s+\(?([{_LETTER}])\b", re.IGNORECASE)
_STANDALONE = re.compile(rf"(?<![A-Za-z0-9\\'{{(_^=+*/-])\(?([{_LETTER}])\)?(?![A-Za-z0-9'(_^=+*/])")


@dataclass(frozen=True)
class Choice:
    """A letter and the text that stands with it."""

    letter: str
    content: str = ""


def read_choice(text: str) -> Choice | None:
    """The choice that an answer is; None where it is something else. One bare letter is a choice."""
    text = text.strip().strip("*").strip()
    found = _LEADING.match(text)
    if found is None:
        return None
    letter = found[1] or found[2]
    bare = found[1] is None
    if bare and letter.islower():
        return None
    content = found[3].strip(" .")
    if re.match(r"(?:or|and)\b|[,/&]", content):
        return None
    if content.startswith(("=", "+", "-", "*", "/", "^", "_", "<", ">", "\\cup", "\\le", "\\ge")):
        return None
    return Choice(letter.upper(), content)


def choice_in(text: str) -> Choice | None:
    """The choice that running text settles on: the first one named, or at its beginning; for what follows 'answer is'."""
    text = text.strip().lstrip("*:").strip()
    if (first := read_choice(text)) is not None:
        return first
    found = list(_STANDALONE.finditer(text))
    found = [m for m in found if not _is_article(m, text)]
    if not found or re.match(r"\s*(?:or|and|/)\s*\(?[A-J]\b", text[found[0].end() :]):
        return None
    return Choice(found[0][1])


def last_choice_in(text: str) -> Choice | None:
    """The choice that running text ends with."""
    text = text.replace("**", " ")
    head = text.strip().splitlines()[0] if text.strip() else ""
    if begins := re.match(rf"\(?([{_LETTER}])(?:[.):]\s|[^\x00-\x7f])", head):
        return Choice(begins[1])
    spoken = _SPOKEN.findall(text)
    if spoken:
        return Choice(spoken[-1].upper())
    found = [m for m in _STANDALONE.finditer(text) if not _is_article(m, text)]
    return Choice(found[-1][1]) if found else None


def _is_article(found: re.Match[str], text: str) -> bool:
    """'A' before a word is no choice, nor is 'I'."""
    if found[0].startswith("("):
        return False
    return found[1] == "I" or (found[1] == "A" and re.match(r"\s+[a-z]", text[found.end() :]) is not None)
