"""Find the way through rooms whose wrong doors lead into corridors that end late, with the search written out.

Written like `path`: ``ab;ac;bd;a>d:`` lists the corridors' edges in random order, then start and target. A response is moves:
``ab`` walks along an edge, ``<a`` goes back to a node that was passed, ``?ab`` checks an edge again without moving. So
``ac;<a;ab;bd`` is right. Which door is right shows only at the end of its corridor.

Pre-training shows searches with habits that no temperature cures (`demonstrate`): after a dead end a search hops to a node
that no edge leads to, walks the same corridor again, guesses the target, or goes back and takes another door.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from e3rl.lab.family import Family, LabTask, Step
from e3rl.lab.path import leading_to, parse_graph


@dataclass(frozen=True)
class _MazeShape:
    """``rooms`` in a row, each with two doors to corridors of ``length`` edges: one to the next room, one to nowhere."""

    rooms: int
    length: int

    def __str__(self) -> str:
        return f"{self.rooms} rooms, corridors of {self.length} steps"


_SHAPES = {
    1: _MazeShape(rooms=2, length=2),
    2: _MazeShape(rooms=2, length=3),
    3: _MazeShape(rooms=3, length=3),
    4: _MazeShape(rooms=4, length=3),
    5: _MazeShape(rooms=6, length=2),
    6: _MazeShape(rooms=3, length=4),
}


def draw(level: int, rng: Random) -> LabTask:
    """A random maze of the level's shape, with random letters and its edges in random order."""
    shape = _SHAPES[level]
    letters = iter(rng.sample(string.ascii_lowercase, 1 + 2 * shape.rooms * shape.length))
    way = [next(letters) for _ in range(shape.rooms * shape.length + 1)]
    edges = list(itertools.pairwise(way))
    for room in way[: -1 : shape.length]:
        edges += itertools.pairwise([room, *(next(letters) for _ in range(shape.length))])
    rng.shuffle(edges)
    ends = f"{way[0]}>{way[-1]}"
    solution = ";".join(a + b for a, b in itertools.pairwise(way))
    question = "".join(f"{a}{b};" for a, b in edges) + f"{ends}:"
    key = "".join(f"{a}{b};" for a, b in sorted(edges)) + ends
    return LabTask(question=question, answer=solution, solution=solution, key=key)


def _judged(question: str, response: str) -> Iterator[tuple[Step, str, bool]]:
    """Each move, the node it ends at, and whether it is allowed: an edge from where the walk is, or back to where it was."""
    edges, node, target = parse_graph(question)
    hopeful, passed, position = leading_to(target, edges), {node}, 0
    for text in response.rstrip().split(";"):
        edge = (text[-2:-1], text[-1:])
        if text.startswith("?"):
            allowed = right = len(text) == 3 and edge in edges
        elif text.startswith("<"):
            allowed = len(text) == 2 and edge[1] in passed
            node, right = edge[1], allowed and edge[1] in hopeful
        else:
            allowed = len(text) == 2 and edge in edges and edge[0] == node
            node, right = edge[1], allowed and edge[1] in hopeful
        passed.add(node)
        yield Step(position, position + len(text), text, right), node, allowed
        position += len(text) + 1


def steps(question: str, answer: str, response: str) -> list[Step]:
    """The moves: right if allowed and the target can still be reached without going back; a check, if there is such an edge."""
    return [step for step, _, _ in _judged(question, response)]


def grade(question: str, answer: str, response: str) -> bool:
    """Whether all moves are allowed and the last one ends at the target. Wrong corridors are forgiven, hops are not."""
    moves = list(_judged(question, response))
    return moves[-1][1] == parse_graph(question)[2] and all(allowed for _, _, allowed in moves)


@dataclass(frozen=True)
class _Habits:
    """What a search does at a dead end; the rest goes back and takes another door."""

    hop: float
    guess: float
    again: float
    check: float


_CALM = _Habits(hop=0.4, guess=0.04, again=0.18, check=0.2)
_LOST = _Habits(hop=0.45, guess=0.0, again=0.3, check=0.2)
"""After a hop."""
_LONGEST = 36  # moves of a demonstration


def demonstrate(question: str, rng: Random) -> str:
    """A search as pre-training shows it: doors at random, and the habits of `_Habits` at dead ends; often wrong, or cut off."""
    edges, node, target = parse_graph(question)
    after: dict[str, list[str]] = {}
    for a, b in sorted(edges):
        after.setdefault(a, []).append(b)
    before = {b: a for a, b in edges}
    nodes, moves, habits, avoided = sorted({*after, *before}), list[str](), _CALM, ""
    while node != target and len(moves) < _LONGEST:
        if doors := [door for door in after.get(node, []) if door != avoided]:
            after_move = rng.choice(doors)
            moves.append(node + after_move)
            node = after_move
            continue
        corridor = [node]
        while len(after.get(corridor[-1], [])) < 2:
            corridor.append(before[corridor[-1]])
        chance = rng.random()
        if chance < habits.hop + habits.guess:
            landed = target if chance < habits.guess else rng.choice([n for n in nodes if n != node])
            moves.append(node + landed)
            node, habits, avoided = landed, _LOST, ""
            continue
        if chance > 1 - habits.check:
            moves += [f"?{a}{b}" for b, a in reversed(list(itertools.pairwise(corridor)))]
        moves.append(f"<{corridor[-1]}")
        again = chance < habits.hop + habits.guess + habits.again
        node, avoided = corridor[-1], "" if again else corridor[-2]
        if again:
            moves.append(node + corridor[-2])
            node = corridor[-2]
    return ";".join(moves)


FAMILY = Family(
    name="maze",
    levels={level: str(shape) for level, shape in _SHAPES.items()},
    training_level=4,
    draw=draw,
    steps=steps,
    grade=grade,
    demonstrate=demonstrate,
)
