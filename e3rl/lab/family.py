"""The interface of a family of lab problems: drawing tasks, reading a response step by step, and grading it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any


@dataclass(frozen=True, slots=True)
class LabTask:
    """One drawn problem. ``key`` identifies its content: tasks that differ in wording or order alone share it.

    ``columns`` are passed only to the environment.
    """

    question: str
    answer: str
    solution: str
    key: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a response: the characters ``start:end`` of it, and whether the step is right."""

    start: int
    end: int
    text: str
    right: bool


@dataclass(frozen=True)
class Family:
    """A kind of problem. ``levels`` describes each level; ``training_level`` is the one to train on."""

    name: str
    levels: Mapping[int, str]
    training_level: int
    draw: Callable[[int, Random], LabTask]
    steps: Callable[[str, str, str], list[Step]]
    """(question, answer, response) -> the steps that the response takes."""
    grade: Callable[[str, str, str], bool]
    """(question, answer, response) -> whether the final answer is right."""
    demonstrate: Callable[[str, Random], str] | None = None
    """(question, rng) -> a response as pre-training shows it, mistakes included; None: it shows solutions."""
