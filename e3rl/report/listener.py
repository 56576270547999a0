"""Keeps a run's page up to date while it trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from e3rl.config import Config
from e3rl.errors import UserError
from e3rl.report import write_report
from e3rl.train.listeners import Silent

_SHARE_OF_TIME = 0.02
"""Writing the page may take at most this share of a run's time."""


class ReportListener(Silent):
    """Rewrites report.html after steps, as often as that stays cheap, and at the end."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note

    def started(self, run: Path, config: Config, method: str, first_step: int, steps: int) -> None:
        self._run = run
        self._write()

    def stepped(self, record: Mapping[str, Any]) -> None:
        if time.perf_counter() >= self._next:
            self._write()

    def finished(self, summary: Mapping[str, Any]) -> None:
        self._write()

    def _write(self) -> None:
        began = time.perf_counter()
        try:
            write_report(self._run)
        except UserError as error:  # a page that can't be written must not cost the run
            self._note(f"the report was not written: {error}")
        now = time.perf_counter()
        self._next = now + (now - began) / _SHARE_OF_TIME
