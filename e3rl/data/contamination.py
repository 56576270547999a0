"""Finds benchmark problems in the training data: exact copies, copies up to typography, and large overlaps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from e3rl.config import DataConfig
from e3rl.data.benchmarks import normalised
from e3rl.types import Problem, Prompt

WORDS = 13
"""Length of the word n-grams that are compared, as in the literature on training data."""

SHARE = 0.5
"""Share of a problem's n-grams that one training problem must contain to be an overlap."""

_COMMON = (
    10  # n-grams in more training problems than this are phrases ("where m and n are relatively prime …"), not evidence
)


@dataclass(frozen=True)
class Overlap:
    """A benchmark problem and the training problem that contains it."""

    benchmark: str
    training: str
    kind: Literal["exact", "normalised", "13-gram"]


def statement(problem: Problem) -> str:
    """A problem's text: all user messages."""
    if isinstance(problem.prompt, str):
        return problem.prompt
    return "\n".join(m.content for m in problem.prompt if m.role == "user")


def _runs(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


def overlaps(training: Sequence[Problem], benchmark: Sequence[Problem]) -> list[Overlap]:
    """At most one overlap for each benchmark problem, of the strictest kind that applies."""
    exact = {statement(p).strip(): p.id for p in reversed(training)}
    plain = {normalised(statement(p)): p.id for p in reversed(training)}
    found: dict[str, Overlap] = {}
    for problem in benchmark:
        text = statement(problem).strip()
        if text in exact:
            found[problem.id] = Overlap(problem.id, exact[text], "exact")
        elif (key := normalised(text)) and key in plain:
            found[problem.id] = Overlap(problem.id, plain[key], "normalised")
    rest = [p for p in benchmark if p.id not in found]
    found |= {o.benchmark: o for o in _shared_runs(training, rest)}
    return [found[p.id] for p in benchmark if p.id in found]


def _shared_runs(training: Sequence[Problem], benchmark: Sequence[Problem]) -> Iterable[Overlap]:
    """Benchmark problems of which one training problem contains at least `SHARE` of the n-grams."""
    runs = {p.id: _runs(normalised(statement(p))) for p in benchmark}
    wanted = set().union(*runs.values()) if runs else set()
    holders: dict[str, list[str]] = {}
    for problem in training:
        for run in wanted & _runs(normalised(statement(problem))):
            holders.setdefault(run, []).append(problem.id)
    telling = {run: ids for run, ids in holders.items() if len(ids) <= _COMMON}
    for id_, own in runs.items():
        counts = Counter(holder for run in own for holder in telling.get(run, ()))
        if counts and counts.most_common(1)[0][1] >= SHARE * len(own):
            yield Overlap(id_, counts.most_common(1)[0][0], "13-gram")


def overlap_notes(
    config: DataConfig, training: Sequence[Prompt], held_out: Mapping[str, Sequence[Prompt]]
) -> list[str]:
    """Warnings for held-out problems found in the training data: one line for each such source.

    Lab problems are not compared with lab problems: the lab's halves can't overlap.
    """
    notes = []
    for source, prompts in held_out.items():
        if config.train.startswith("lab:") and source.startswith("lab:"):
            continue
        found = overlaps([p.problem for p in training], [p.problem for p in prompts])
        notes += [warning(found, config.train, source, len(prompts))] if found else []
    return notes


def warning(found: Sequence[Overlap], training: str, benchmark: str, total: int) -> str:
    """The warning before training: how many overlaps, of which kind, and the first three."""
    kinds = Counter(o.kind for o in found)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    shown = "; ".join(f"'{o.benchmark}' is '{o.training}'" for o in found[:3])
    return (
        f"{len(found)} of the {total} problems of {benchmark} are in the training data {training} ({listed}): figures "
        f"on them say nothing about new problems. {shown}{'; …' if len(found) > 3 else ''}"
    )
