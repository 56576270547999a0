"""The interface between decoding and environments: an environment answers each turn of the model, and may undo its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from e3rl.types import Observed, Problem


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to an assistant turn: ``ids`` to append, and the observation in them. ``undoable``: `Episode.undo` would work.

    ``end``: nothing follows, because the turn called no tool ('stop') or no further turn is allowed ('length'). ``failure``: the
    environment hung or died, which ends the trajectory without a reward.
    """

    ids: tuple[int, ...] = ()
    observation: Observed | None = None
    undoable: bool = False
    end: str | None = None
    failure: str | None = None


class Episode(Protocol):
    """The environment of one trajectory. Calls come one at a time, each in a thread that may be abandoned."""

    environment: Any

    def act(self, ids: Sequence[int]) -> Reply:
        """Execute the calls of an assistant turn."""

    def undo(self) -> Reply:
        """Undo the last `act`; a reply with a failure if that didn't work."""

    def close(self) -> None:
        """Called when the trajectory is complete or abandoned."""


class Tools(Protocol):
    """The tools of a rendered prompt. ``deadline``: seconds for one turn's calls. ``erasures``: the limit for one turn."""

    deadline: float
    erasures: int
    threshold: float

    def open(self, problem: Problem) -> Episode:
        """A fresh environment for one trajectory."""
