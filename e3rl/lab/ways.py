"""Find any of several ways through a small graph with dead ends.

Written like `path`: ``ae;eb;ac;cb;cx;a>b:`` is answered ``eb`` or ``cb``. Where `path` has one way and at most a detour, here
all ways are equally good and none is the likeliest; sampling more sharply repeats the same one. A wrong turn shows one step late.
"""

from __future__ import annotations

import itertools
import string
from dataclasses import dataclass
from random import Random

from e3rl.lab import path
from e3rl.lab.family import Family, LabTask


@dataclass(frozen=True)
class _WaysShape:
    """``ways`` separate ways of ``length`` edges each; ``dead_ends`` of the nodes on them also lead nowhere."""

    ways: int
    length: int
    dead_ends: int

    def __str__(self) -> str:
        return f"{self.ways} ways of {self.length} steps, {self.dead_ends} dead ends"


_SHAPES = {
    1: _WaysShape(ways=2, length=2, dead_ends=2),
    2: _WaysShape(ways=2, length=3, dead_ends=2),
    3: _WaysShape(ways=3, length=3, dead_ends=3),
    4: _WaysShape(ways=2, length=4, dead_ends=3),
    5: _WaysShape(ways=3, length=4, dead_ends=4),
}


def draw(level: int, rng: Random) -> LabTask:
    """A random graph of the level's shape, with random letters and its edges in random order."""
    shape = _SHAPES[level]
    letters = iter(rng.sample(string.ascii_lowercase, len(string.ascii_lowercase)))
    start, target = next(letters), next(letters)
    inner = [[next(letters) for _ in range(shape.length - 1)] for _ in range(shape.ways)]
    edges = [edge for nodes in inner for edge in itertools.pairwise([start, *nodes, target])]
    forks = [start, *itertools.chain.from_iterable(inner)]
    edges += [(node, next(letters)) for node in rng.sample(forks, shape.dead_ends)]
    rng.shuffle(edges)
    answer = "".join([*rng.choice(inner), target])
    question = "".join(f"{a}{b};" for a, b in edges) + f"{start}>{target}:"
    key = "".join(f"{a}{b};" for a, b in sorted(edges)) + f"{start}>{target}"
    return LabTask(question=question, answer=answer, solution=answer, key=key)


FAMILY = Family(
    name="ways",
    levels={level: str(shape) for level, shape in _SHAPES.items()},
    training_level=2,
    draw=draw,
    steps=path.steps,
    grade=path.grade,
)
