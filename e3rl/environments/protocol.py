"""The seam between decoding and environments: a turn of the model ends, something answers it, and may take the answer back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from e3rl.types import Observed, Problem


@dataclass(frozen=True, slots=True)
class Reply:
    """What follows an assistant turn: ``ids`` to go on from, and what they stand for. ``undoable``: `Episode.undo` would work.

    ``end``: nothing follows: the turn called no tool ('stop'), or no further turn is allowed ('length'). ``failure``: the
    environment hung or died, which ends the trajectory without a reward.
    """

    ids: tuple[int, ...] = ()
    observation: Observed | None = None
    undoable: bool = False
    end: str | None = None
    failure: str | None = None


class Episode(Protocol):
    """The environment of one trajectory. Calls come one at a time, each in a thread that may be given up on."""

    environment: Any

    def act(self, ids: Sequence[int]) -> Reply:
        """Carry out what an assistant turn asks for."""

    def undo(self) -> Reply:
        """Take the last `act` back; a reply with a failure where that didn't work."""

    def close(self) -> None:
        """The trajectory is complete or given up."""


class Tools(Protocol):
    """What a prompt was rendered with. ``deadline``: seconds that one turn's calls may take. ``erasures``: of one turn."""

    deadline: float
    erasures: int
    threshold: float

    def open(self, problem: Problem) -> Episode:
        """A fresh environment for one trajectory."""
