"""Checks whether a response is right. Runs only in worker processes, so that a hang or a crash costs one grade."""

from __future__ import annotations

import re

from e3rl.rewards.answers import (
    LONGEST_ANSWER,
    Unboxed,
    after_marker,
    boxed_answer,
    extract_answer,
    is_prose,
    normalize,
    response_of,
)
from e3rl.rewards.choices import LetteredChoice, last_choice, read_choice, stated_choice, taken_back
from e3rl.rewards.compare import same_answer
from e3rl.rewards.notation import clean, tidied
from e3rl.rewards.quantities import read_quantity
from e3rl.rewards.rules import same_choice

Verdict = tuple[bool | None, str]
_SHOWN = 80
_OPEN_BOX = re.compile(r"\\{1,4}(?:boxed|fbox)\s?\{")


def check(gold: str, response: str, unboxed: Unboxed = "last") -> Verdict:
    """True, false or None (undecided), and the reason in a few words."""
    reference = reference_answer(tidied(gold))
    if reference is None:
        return None, "the reference holds no answer that can be found"
    if len(reference) > LONGEST_ANSWER:
        return None, f"the reference's answer has {len(reference)} characters, more than {LONGEST_ANSWER}"
    response = tidied(response)
    wanted = read_choice(clean(reference))
    if wanted is not None and (chosen := _choice(response, unboxed)) is not None:
        return _verdict(same_choice(wanted, chosen), wanted.letter, _shown(chosen))
    answer = extract_answer(response, unboxed)
    if answer is None and unboxed == "last":
        answer = _in_words(response)
    if answer is None:
        return False, "no answer was found in the response"
    if len(answer) > LONGEST_ANSWER:
        return False, f"the answer has {len(answer)} characters, more than any reference answer"
    if "=" in answer and read_quantity(clean(reference)) and is_prose(response) and _unmarked(response):
        answer = answer.rpartition("=")[2].strip("$ ")  # a formula in running text: its right-hand side
    copied = normalize(answer) in (normalize(reference), normalize(gold[: 2 * LONGEST_ANSWER]))
    same = bool(normalize(answer)) and (copied or same_answer(reference, answer))
    return _verdict(same, reference, answer)


def reference_answer(gold: str) -> str | None:
    """The answer in a reference: the whole text, unless it is prose."""
    if "\\boxed" in gold or "\\fbox" in gold or after_marker(gold) is not None or is_prose(gold):
        return extract_answer(gold) or _OPEN_BOX.sub("", gold).strip() or None  # a box that was cut off
    return gold.strip() or None


def _verdict(correct: bool, gold: str, answer: str) -> Verdict:
    return correct, f"'{_short(answer)}' {'equals' if correct else 'is not'} '{_short(gold)}'"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _shown(choice: LetteredChoice) -> str:
    return f"{choice.letter}. {choice.content}" if choice.content else choice.letter


def _unmarked(response: str) -> bool:
    return boxed_answer(response) is None and after_marker(response) is None


def _choice(response: str, unboxed: Unboxed) -> LetteredChoice | None:
    """The choice in a response: in its box, after 'answer is', or at its end."""
    said = response_of(response)
    if said is None:
        return None
    boxed = boxed_answer(said)
    if boxed is not None:
        return read_choice(clean(boxed)) if len(boxed) <= LONGEST_ANSWER else None
    if unboxed == "none":
        return None
    marked = after_marker(said)
    if marked is not None:
        return None if taken_back(marked) else stated_choice(marked.split("\n\n")[0])
    return last_choice(said) if unboxed == "last" or len(said.strip()) < 10 else None


def _in_words(response: str) -> str | None:
    """A short response without mathematics is its own answer."""
    said = (response_of(response) or "").strip()
    return said if 0 < len(said) <= _SHOWN and "boxed" not in said and not re.search(r"\d", said) else None
