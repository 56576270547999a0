"""How far an evaluation is: a bar where there is a terminal, a line now and then where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from e3rl.evaluate.samples import Sample

_EVERY = 30.0  # seconds between lines


class LiveSamples:
    """Counts samples, their tokens and how many are right; for a ``with`` block."""

    def __init__(self, name: str, total: int) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=self._console, transient=True, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(name, total=total)
        self._name, self._total = name, total
        self._done = self._right = self._tokens = 0
        self._began = self._told = time.monotonic()

    def __enter__(self) -> LiveSamples:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, samples: Sequence[Sample]) -> None:
        """A group has finished."""
        self._done += len(samples)
        self._right += sum(s.correct is True for s in samples)
        self._tokens += sum(s.generated for s in samples)
        self._total = max(self._total, self._done)  # an equal budget's samples are known only on the way
        now = time.monotonic()
        text = f"{self._name}: {self._right / self._done:.3f} right, {self._tokens / max(now - self._began, 1e-9):.0f} tokens/s"
        self._bar.update(self._task, completed=self._done, total=self._total, description=text)
        if not self._console.is_terminal and now - self._told >= _EVERY:
            self._told = now
            print(f"{text}, {self._done}/{self._total} samples", file=sys.stderr, flush=True)
