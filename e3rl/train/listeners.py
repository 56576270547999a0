"""Who is told how a run goes: the terminal, trackers, the report. The trainer only calls; it never looks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from e3rl.config import Config


class Listener(Protocol):
    """Told of everything that happens in a run. Every method may do nothing."""

    def started(self, run: Path, config: Config, method: str, first_step: int, steps: int) -> None:
        """The run begins, or goes on after ``first_step`` - 1 steps."""

    def progressed(self, activity: str, done: int, of: int) -> None:
        """Within a step: ``done`` of ``of`` trajectories of 'rollout' or 'evaluation' are finished."""

    def stepped(self, record: Mapping[str, Any]) -> None:
        """A step is done; ``record`` is its line of metrics.jsonl."""

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """An evaluation is done; ``record`` is its line of evaluations.jsonl."""

    def noted(self, text: str) -> None:
        """Something a person should read."""

    def finished(self, summary: Mapping[str, Any]) -> None:
        """The run is complete."""


class Silent:
    """Listens to nothing; a base for listeners that care about some events only."""

    def started(self, run: Path, config: Config, method: str, first_step: int, steps: int) -> None:
        pass

    def progressed(self, activity: str, done: int, of: int) -> None:
        pass

    def stepped(self, record: Mapping[str, Any]) -> None:
        pass

    def evaluated(self, record: Mapping[str, Any]) -> None:
        pass

    def noted(self, text: str) -> None:
        pass

    def finished(self, summary: Mapping[str, Any]) -> None:
        pass


def tell(listeners: Iterable[Listener], event: str, *values: Any) -> None:
    """Call the method ``event`` of every listener."""
    for listener in listeners:
        getattr(listener, event)(*values)
