"""The interface between decoding and environments: an environment answers each turn of the model, and may undo its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from e3rl.environments.tools import call
from e3rl.types import Group, Observed, Problem, Trajectory


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

    @property
    def environment(self) -> Any:
        """What rewards are given."""

    def act(self, ids: Sequence[int], begin: Callable[[], None]) -> Reply:
        """Execute the calls of an assistant turn.

        ``begin`` is called before each: the deadline starts anew. It raises if nobody waits any more, and the rest is not done.
        """

    def undo(self) -> Reply:
        """Undo the last `act`; a reply with a failure if that didn't work."""

    def close(self) -> None:
        """Called when the trajectory is complete or abandoned."""


class Tools(Protocol):
    """The tools of a rendered prompt. ``deadline``: seconds for one call. ``erasures``: the limit for one turn.

    ``identity`` is equal in two processes that have the same tools under the same settings.
    """

    identity: str
    deadline: float
    erasures: int
    threshold: float

    def open(self, problem: Problem) -> Episode:
        """A fresh environment for one trajectory."""


@dataclass(frozen=True, slots=True)
class RemoteEnvironment:
    """What reward functions get in place of an environment that lived in another process: its reward, and nothing else."""

    reward: float | None

    def get_reward(self) -> float | None:
        """What the environment's ``get_reward`` returned; None without one."""
        return self.reward


def settled(group: Group) -> Group:
    """The group with a `RemoteEnvironment` in place of each environment, so that it can go to another process."""
    return replace(group, trajectories=tuple(map(_settled, group.trajectories)))


def _settled(trajectory: Trajectory) -> Trajectory:
    """A ``get_reward`` that raises, or returns no number, fails its trajectory."""
    if trajectory.environment is None:
        return trajectory
    ask = getattr(trajectory.environment, "get_reward", None)
    try:
        value = None if ask is None else call(ask, {})
        return replace(trajectory, environment=RemoteEnvironment(None if value is None else float(value)))
    except (Exception, SystemExit) as error:  # user code may raise anything
        said = trajectory.failure or f"get_reward() failed: {type(error).__name__}: {error}"
        return replace(trajectory, environment=RemoteEnvironment(None), failure=said)
