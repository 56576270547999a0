"""Ctrl-C and termination as a request: the run stops where its state is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from e3rl.cluster.ranks import Ranks


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
