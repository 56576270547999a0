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
    r"|cannot|can't|eliminate|rule out|except|unless|or so|i guess)|[Nn]or?)\b|\?[\s).*$]*$"
)
_SENTENCE = re.compile(r"[.;?](?:\s|$)|!(?=\s[A-Z])|\.\.\.|…|。|\s--?\s(?=[a-z])|\n")
_FORMULA = re.compile(r"\$[^$]{1,600}\$|\\\((?:[^\\]|\\(?![()])){1,600}\\\)")
_STOP = re.compile(r"[;?…。]|\.(?= )|!(?= [A-Z])|(?<= )--?(?= )")
_ANSWER = rf"[\s*(]{{0,8}}(?:\$|-?\d[\d.,/]{{0,40}}|\\[a-z]|[{_LETTER}](?![A-Za-z'])|[a-z](?=\s?[-+*/^_=]))"
_HEDGED = re.compile(
    rf"\b(?:i (?:guess|think|believe|suppose)|not sure|probably|presumably|then{_ANSWER})(?![A-Za-z])", re.IGNORECASE
)
_TAKEN_BACK = re.compile(
    rf"""\W{{0,8}} (?:(?:but|and|so|oh|then|hmm+|ah)\b[\s,]{{0,3}}){{0,2}} (?:
    nope\b | no\b(?:[,.!:;]|\ wait|$) | (?:wait|actually|hmm+|oops|sorry|rather|correction|never\ ?mind|i\ meant?)\b
    | or\b(?!\ equivalently|\ simply|\ in\ other\ words) | (?:maybe|perhaps|possibly|scratch\ that|on\ second\ thought)\b
    | ignore\ (?:that|this)\b | let\ me\ (?:correct|reconsider|rethink|redo|recompute|recalculate)\b | (?:wrong|incorrect)[.:!,]
    | (?:it|that|this)(?:'s|\ is)\ (?:wrong|incorrect|not\ (?:right|correct|true))\b
    | (?:it|the\ answer)\ (?:might|could|may)\ (?:also\ )?be{_ANSWER}
    | (?:not|also|otherwise|alternatively|however|then\ again|again)\b,?(?:\ (?:it\ is|it's|the\ answer\ is))?{_ANSWER}
    )""",
    re.IGNORECASE | re.VERBOSE,
)
"""How a sentence begins that takes back the one before, or sets another answer beside it."""
_ANSWER_ALONE = re.compile(
    rf"(\$[^$]{{1,600}}\$|{_ANSWER}[^\s]{{0,60}})\s?(?:is (?:also )?(?:possible|right|correct)\b.{{0,20}})?"
)


@dataclass(frozen=True)
class LetteredChoice:
    """A letter and the text beside it."""

    letter: str
    content: str = ""


def doubtful(text: str) -> bool:
    """Whether a text retracts or hedges its statement."""
    return _DOUBT.search(text) is not None


def taken_back(statement: str) -> bool:
    """Whether a statement hedges, or what follows its first sentence takes it back or is another answer on the same line."""
    said, beside, rest = _sentences(statement)
    if _HEDGED.search(said) or said.endswith("?"):
        return True
    if beside and beside != said and (read_choice(said) is None or read_choice(beside) is not None):
        return True
    return any(_TAKEN_BACK.match(sentence) for sentence in _SENTENCE.split(rest))


def _sentences(statement: str) -> tuple[str, str, str]:
    """The first sentence; the next one on its line, where it is nothing but an answer; and all that follows the first."""
    statement = _FORMULA.sub(lambda m: _STOP.sub(",", " ".join(m[0].split())), statement)
    end = _SENTENCE.search(statement)
    if end is None:
        return statement, "", ""
    said, rest = statement[: end.end()].strip(" $*()."), statement[end.end() :]
    line = "" if "\n" in end[0] else rest.split("\n", 1)[0].strip()
    alone = _ANSWER_ALONE.fullmatch(_SENTENCE.split(line, maxsplit=1)[0].strip())
    return said, alone[1].strip(" $*().") if alone else "", rest


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
    label, content, _ = _sentences(text.strip().lstrip("*:$ "))
    text = _BECAUSE.split(text.strip().lstrip("*:").strip() + " ", maxsplit=1)[0].replace("**", "").strip()
    first = read_choice(text.lstrip("$"))
    if first is not None and content and read_choice(label) == first:
        return LetteredChoice(first.letter, content)
    if doubtful(text) and first is None:
        return None
    if first is not None:
        return first if settled(first) else None
    letters = _letters(text)
    return LetteredChoice(letters[0][1]) if len({m[1] for m in letters}) == 1 else None


def last_choice(text: str) -> LetteredChoice | None:
    """The choice at the end of running text; None if its last clause with a letter offers several or denies it."""
    text = text.replace("**", "").strip()
    if doubtful(text[-1:]):
        return None
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
