"""Find a way through a small graph with dead ends.

``ae;ab;bd;a>d:`` lists directed edges in random order, then start and target; the answer is the nodes after the start,
``bd``. A wrong turn into a dead end can't be corrected: the next node is then either missing or not connected.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from e3rl.lab.family import Family, LabTask, Step


@dataclass(frozen=True)
class _PathShape:
    """The shape of a level's graphs; ranges include both ends.

    ``length`` edges lead from start to target; ``dead_ends`` nodes on the way also have a branch of ``depth`` nodes that
    leads nowhere; ``detours`` nodes on the way can be walked around, so that both ways are right.
    """

    length: int
    dead_ends: tuple[int, int]
    depth: int = 1
    detours: tuple[int, int] = (0, 1)

    def __str__(self) -> str:
        dead_ends, detours = ("-".join(map(str, sorted({*span}))) for span in (self.dead_ends, self.detours))
        return f"{self.length} steps, {dead_ends} dead ends of {self.depth}, {detours} detours"


_SHAPES = {
    1: _PathShape(length=2, dead_ends=(1, 2), detours=(0, 0)),
    2: _PathShape(length=3, dead_ends=(1, 3)),
    3: _PathShape(length=4, dead_ends=(2, 3)),
    4: _PathShape(length=5, dead_ends=(3, 4)),
    5: _PathShape(length=6, dead_ends=(4, 5)),
    6: _PathShape(length=6, dead_ends=(4, 5), depth=2),
}

Edges = frozenset[tuple[str, str]]


def draw(level: int, rng: Random) -> LabTask:
    """A random graph of the level's shape, with random letters and its edges in random order."""
    shape = _SHAPES[level]
    letters = iter(rng.sample(string.ascii_lowercase, len(string.ascii_lowercase)))
    way = [next(letters) for _ in range(shape.length + 1)]
    edges = list(itertools.pairwise(way))
    for node in rng.sample(way[:-1], rng.randint(*shape.dead_ends)):
        branch = [node, *(next(letters) for _ in range(shape.depth))]
        edges += itertools.pairwise(branch)
    for position in rng.sample(range(shape.length - 1), rng.randint(*shape.detours)):
        around = next(letters)
        edges += [(way[position], around), (around, way[position + 2])]
    rng.shuffle(edges)
    ends = f"{way[0]}>{way[-1]}"
    answer = "".join(way[1:])
    question = "".join(f"{a}{b};" for a, b in edges) + f"{ends}:"
    key = "".join(f"{a}{b};" for a, b in sorted(edges)) + ends
    return LabTask(question=question, answer=answer, solution=answer, key=key)


def parse_graph(question: str) -> tuple[Edges, str, str]:
    """The edges, start and target that a question lists."""
    *edges, ends = question.rstrip(":").split(";")
    start, target = ends.split(">")
    return frozenset((edge[0], edge[1]) for edge in edges), start, target


def leading_to(target: str, edges: Iterable[tuple[str, str]]) -> set[str]:
    """All nodes from which ``target`` can be reached, itself included."""
    found, edges = {target}, list(edges)
    while new := {a for a, b in edges if b in found} - found:
        found |= new
    return found


def steps(question: str, answer: str, response: str) -> list[Step]:
    """One step a character: right if an edge leads there from the node before and the target can still be reached."""
    edges, node, target = parse_graph(question)
    hopeful, found = leading_to(target, edges), []
    for position, after in enumerate(response.rstrip()):
        found.append(Step(position, position + 1, after, (node, after) in edges and after in hopeful))
        node = after
    return found


def grade(question: str, answer: str, response: str) -> bool:
    """Whether the response walks along edges from the start to the target; any such way counts."""
    taken = steps(question, answer, response)
    return bool(taken) and all(step.right for step in taken) and taken[-1].text == parse_graph(question)[2]


FAMILY = Family(
    name="path",
    levels={level: str(shape) for level, shape in _SHAPES.items()},
    training_level=3,
    draw=draw,
    steps=steps,
    grade=grade,
)
