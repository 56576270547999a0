"""Grading: a reference and a response, either with its answer somewhere in it, become true, false or not to be said."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from e3rl.rewards.answers import (
    after_marker,
    boxed_answer,
    extract_answer,
    is_prose,
    last_box,
    normalize,
    response_of,
)
from e3rl.rewards.choices import Choice, choice_in, last_choice_in, read_choice
from e3rl.rewards.notation import clean
from e3rl.rewards.pool import Task, WorkerPool
from e3rl.rewards.quantities import read_quantity
from e3rl.rewards.rules import by_quantity

LONGEST_ANSWER = 2000
"""Characters beyond which an answer is wrong without a look: no reference answer comes near, hanging inputs do."""

CHECK_MEMORY = 2 * 2**30

_SHOWN = 80
_OPEN_BOX = re.compile(r"\\+(?:boxed|fbox)\s*\{")


@dataclass(frozen=True, slots=True)
class Grade:
    """``correct`` is None where nothing can be said, and ``reason`` tells why in a few words."""

    correct: bool | None
    reason: str


def reference_answer(gold: str) -> str | None:
    """The answer that a reference holds: the whole of it, unless it is running text."""
    if "\\boxed" in gold or "\\fbox" in gold or after_marker(gold) is not None or is_prose(gold):
        return extract_answer(gold) or _OPEN_BOX.sub("", gold).strip() or None  # a box that was cut off
    return gold.strip() or None


def grade_all(pairs: Sequence[tuple[str | None, str]], pool: WorkerPool) -> list[Grade]:
    """The grade of every (reference, response). Each distinct pair of answers is checked once, in the killable workers."""
    prepared = [_prepare(gold, response) for gold, response in pairs]
    hard = list(dict.fromkeys(p for p in prepared if not isinstance(p, Grade)))
    tasks = [
        Task("e3rl.rewards.math_check:equivalent", {"gold": gold, "answer": answer}, CHECK_MEMORY)
        for gold, answer in hard
    ]
    outcomes = dict(zip(hard, pool.map(tasks), strict=True)) if hard else {}
    grades = []
    for item in prepared:
        if isinstance(item, Grade):
            grades.append(item)
        elif (error := outcomes[item].error) is not None:
            grades.append(Grade(None, f"the check {error}"))
        else:
            grades.append(_grade(bool(outcomes[item].value), *item))
    return grades


def _grade(correct: bool, gold: str, answer: str) -> Grade:
    return Grade(correct, f"'{_short(answer)}' {'equals' if correct else 'is not'} '{_short(gold)}'")


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _prepare(gold: str | None, response: str) -> Grade | tuple[str, str]:
    """A grade where text alone decides, else the two answers to be compared."""
    if gold is None or not gold.strip():
        return Grade(None, "there is no reference answer to compare with")
    reference = reference_answer(gold)
    if reference is None:
        return Grade(None, "the reference holds no answer that can be found")
    wanted = read_choice(clean(reference))
    if wanted is not None and (chosen := _choice(response)) is not None:
        return _grade(chosen.letter == wanted.letter, wanted.letter, chosen.letter)
    answer = extract_answer(response)
    if answer is None:
        answer = _in_words(response)
    if answer is None:
        return Grade(False, "no answer was found in the response")
    if len(answer) > LONGEST_ANSWER:
        return Grade(False, f"the answer has {len(answer)} characters, more than any reference answer")
    if "=" in answer and read_quantity(clean(reference)) and is_prose(response) and _unmarked(response):
        answer = answer.rpartition("=")[2].strip("$ ")  # a formula in passing: what it comes to
    lone = read_choice(clean(answer))
    if lone is not None and not lone.content and wanted is None and (named := last_choice_in(gold)) is not None:
        return _grade(named.letter == lone.letter, named.letter, lone.letter)
    if normalize(reference) == normalize(answer):
        return _grade(True, reference, answer)
    numbers = by_quantity(clean(reference), clean(answer))
    return (reference, answer) if numbers is None else _grade(numbers, reference, answer)


def _unmarked(response: str) -> bool:
    return boxed_answer(response) is None and after_marker(response) is None


def _choice(response: str) -> Choice | None:
    """The choice that a response makes: in its box, after 'answer is', or in what it ends with."""
    said = response_of(response)
    if said is None:
        return None
    boxed = boxed_answer(said)
    if boxed is not None:
        return read_choice(clean(boxed)) if len(boxed) <= LONGEST_ANSWER else None
    marked = after_marker(said)
    if marked is not None:
        return choice_in(marked.split("\n\n")[0])
    return last_choice_in(said)


def _in_words(response: str) -> str | None:
    """A short response without mathematics is its own answer."""
    said = (response_of(response) or "").strip()
    return said if 0 < len(said) <= _SHOWN and last_box(said) is None and "\\boxed" not in said else None
