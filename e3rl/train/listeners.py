"""Listeners, which a run tells what happens, and the request to stop it by a signal."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from e3rl.cluster.ranks import Ranks
from e3rl.config import Config


class Listener(Protocol):
    """Receives the events of a run. Every method may do nothing."""

    def started(self, run: Path, config: Config, method: str, first_step: int, steps: int) -> None:
        """The run begins, or goes on after ``first_step`` - 1 steps."""

    def progressed(self, activity: str, done: int, of: int) -> None:
        """A phase begins or gets on: 'rollout', 'reward', 'training' or 'evaluating', ``done`` of ``of``; 0 of 0: not counted."""

    def stepped(self, record: Mapping[str, Any]) -> None:
        """A step is done; ``record`` is its line of metrics.jsonl."""

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """An evaluation is done; ``record`` is its line of evaluations.jsonl."""

    def noted(self, text: str) -> None:
        """A message for the user."""

    def finished(self, summary: Mapping[str, Any]) -> None:
        """The run is complete."""


class Silent:
    """Ignores all events; a base class for listeners that need only some."""

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


class Interrupted(Exception):
    """Raised at a safe place after the user asked the run to stop."""


class StopRequest:
    """While active, the first SIGINT or SIGTERM asks the run to stop; a second one stops it at once.

    Of several ranks none may stop alone: they stop together, at the end of a step, however often they are asked.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks()
        self._asked = False
        self._before: dict[int, Any] = {}

    def ask(self) -> None:
        """Ask the run to stop, as a signal does."""
        self._asked = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked and self._ranks.world == 1:
            raise KeyboardInterrupt
        self.ask()
        if self._ranks.first:
            again = "; again to stop now, without saving" if self._ranks.world == 1 else ""
            # not by print: the signal may have come in the middle of one
            os.write(2, f"\nstopping as soon as the state is whole{again}\n".encode())

    def check(self) -> None:
        """Raise `Interrupted` if a stop was asked for. Called where nothing is half done."""
        if self._asked and self._ranks.world == 1:
            raise Interrupted

    def check_together(self) -> None:
        """`check` at the end of a step: every rank stops where any was asked to."""
        if self._ranks.any(self._asked):
            raise Interrupted

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
