"""Procedural problems: endless, graded, with solutions, and split so that training never sees a held-out problem.

A problem belongs to the training half or to the held-out half by a hash of its content. Whatever the seed or the count,
the halves can't overlap.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Literal, get_args

from e3rl.errors import UserError, unknown
from e3rl.lab import arith, books, chain, maze, path, ways
from e3rl.lab.family import Family, LabTask, Step
from e3rl.types import Problem

Split = Literal["train", "heldout"]

FAMILIES: dict[str, Family] = {
    family.name: family for family in (chain.FAMILY, path.FAMILY, ways.FAMILY, maze.FAMILY, arith.FAMILY, books.FAMILY)
}

DEFAULT_COUNTS: dict[Split, int] = {"train": 2048, "heldout": 256}
"""Problems of a level that `load` returns without a count."""

_PATIENCE = 5000  # draws in a row without a new problem before a level counts as exhausted


@dataclass(frozen=True, slots=True)
class LabSelection:
    """What a name such as ``lab:chain:1-3`` selects."""

    family: str
    levels: tuple[int, ...]


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise unknown("lab family", name, FAMILIES)
    return FAMILIES[name]


def _checked(name: str, level: int, split: str) -> Family:
    family = _family(name)
    if level not in family.levels:
        raise UserError(f"lab:{name} has no level {level}: choose one of {min(family.levels)} to {max(family.levels)}")
    if split not in get_args(Split):
        raise unknown("split of a lab family", split, get_args(Split))
    return family


def parse(name: str) -> LabSelection:
    """``lab:FAMILY`` (its training level), ``lab:FAMILY:LEVEL`` or ``lab:FAMILY:FIRST-LAST``."""
    match = re.fullmatch(r"lab:(\w+)(?::(\d+)(?:-(\d+))?)?", name)
    if match is None:
        raise UserError(f"'{name}' names no lab problems: write lab:chain, lab:chain:3 or lab:chain:1-5")
    family = _family(match[1])
    first = int(match[2]) if match[2] else family.training_level
    last = int(match[3]) if match[3] else first
    if first > last:
        raise UserError(f"'{name}': levels run from low to high, so write lab:{family.name}:{last}-{first}")
    for level in (first, last):
        _checked(family.name, level, "train")
    return LabSelection(family.name, tuple(range(first, last + 1)))


def half(family: str, key: str) -> Split:
    """The half that a problem's content belongs to."""
    return "train" if hashlib.sha256(f"{family}/{key}".encode()).digest()[0] % 2 else "heldout"


def _tasks(family: Family, level: int, split: Split, seed: int) -> Iterator[LabTask]:
    """Tasks of one half without repetition, until the level has no more."""
    rng, seen, misses = Random(f"{family.name}/{level}/{split}/{seed}"), set[str](), 0
    while misses < _PATIENCE:
        task = family.draw(level, rng)
        if task.question in seen or half(family.name, task.key) != split:
            misses += 1
            continue
        misses = 0
        seen.add(task.question)
        yield task


def _problem(family: Family, level: int, id: str, task: LabTask) -> Problem:
    told = {"family": family.name, "level": level, "question": task.question, "solution": task.solution}
    columns = {**told, **task.columns}
    return Problem(id=id, prompt=task.question, answer=task.answer, columns=columns)


def _up_to(name: str, level: int, split: Split, count: int, seed: int) -> list[Problem]:
    family = _checked(name, level, split)
    mark = f"s{seed}-" if seed else ""
    tasks = islice(_tasks(family, level, split, seed), count)
    return [_problem(family, level, f"{name}-{level}-{split}-{mark}{i:06d}", task) for i, task in enumerate(tasks)]


def generate(family: str, level: int, split: Split, count: int, seed: int = 0) -> list[Problem]:
    """The first ``count`` problems of a level's half, all different; the same arguments give the same problems."""
    problems = _up_to(family, level, split, count, seed)
    if len(problems) < count:
        raise UserError(f"lab:{family}:{level} has only {len(problems)} {split} problems; {count} were asked for")
    return problems


def load(name: str, split: Split, count: int | None = None, seed: int = 0) -> list[Problem]:
    """The problems that a name such as ``lab:chain:1-3`` selects, ``count`` in all, divided evenly among its levels.

    Without ``count`` each level gives `DEFAULT_COUNTS` problems, or all it has.
    """
    selection = parse(name)
    if count is None:
        per_level = [_up_to(selection.family, level, split, DEFAULT_COUNTS[split], seed) for level in selection.levels]
    else:
        shares = [count // len(selection.levels)] * len(selection.levels)
        shares = [share + (i < count % len(shares)) for i, share in enumerate(shares)]
        pairs = zip(selection.levels, shares, strict=True)
        per_level = [generate(selection.family, level, split, share, seed) for level, share in pairs]
    return [problem for problems in per_level for problem in problems]


def _read(problem: Problem) -> tuple[Family, str, str]:
    """The family, question and answer of a lab problem."""
    if problem.answer is None or not {"family", "question"} <= problem.columns.keys():
        raise UserError(f"problem '{problem.id}' is not one of the lab's: it lacks an answer, 'family' or 'question'")
    return _family(problem.columns["family"]), problem.columns["question"], problem.answer


def step_correctness(problem: Problem, response: str) -> list[Step]:
    """The steps that a response takes, in order, and whether each is right."""
    family, question, answer = _read(problem)
    return family.steps(question, answer, response)


def first_error(problem: Problem, response: str) -> Step | None:
    """The first wrong step of a response; None where all its steps are right."""
    return next((step for step in step_correctness(problem, response) if not step.right), None)


def grade(problem: Problem, response: str) -> bool:
    """Whether the response's final answer is right."""
    family, question, answer = _read(problem)
    return family.grade(question, answer, response)


def demonstration(problem: Problem, rng: Random) -> str:
    """A response as pre-training shows it: the family's own way to search, else the solution."""
    family, question, _ = _read(problem)
    return family.demonstrate(question, rng) if family.demonstrate else solution(problem)


def solution(problem: Problem) -> str:
    """A response that solves the problem, as a supervised target."""
    return str(problem.columns["solution"])
