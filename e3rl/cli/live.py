"""Live output: samples of a prompt while they are generated, and the progress of an evaluation."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from e3rl.rollout.orders import Committed, Erased, Event
from e3rl.serve.text import TextStream
from e3rl.types import Observed

if TYPE_CHECKING:
    from e3rl.generation import Generation

ERASED_STYLE = "red strike dim"


class LiveText:
    """On a terminal the text is updated live; elsewhere it is printed once, erasures as ~~text~~."""

    def __init__(self, console: Console, prompt: str, tokenizer: Any) -> None:
        self._console = console
        self._samples: defaultdict[int, Text] = defaultdict(Text)
        self._streams: defaultdict[int, TextStream] = defaultdict(lambda: TextStream(tokenizer, ()))
        self._turns: defaultdict[int, int] = defaultdict(int)  # where the text of each sample's turn begins
        console.print(Text(prompt, style="dim"))
        self._live = Live(Text(""), console=console, refresh_per_second=12) if console.is_terminal else None
        if self._live:
            self._live.start()

    def observe(self, event: Event) -> None:
        """Callback for the driver. A character that spans two segments appears with its last token."""
        if isinstance(event, Committed) and event.segment.observation is not None:
            self._answered(event.sibling, event.segment.observation, erased=False)
        elif isinstance(event, Erased) and event.erasure.observation is not None:
            self._answered(event.sibling, event.erasure.observation, erased=True)
        elif isinstance(event, Committed):
            candidate = event.segment.candidate
            text = self._streams[event.sibling].add(candidate.ids.tolist(), last=candidate.ended)
            self._samples[event.sibling].append(text)
        elif isinstance(event, Erased):
            struck = self._streams[event.sibling].would_add(event.erasure.candidate.ids.tolist())
            self._samples[event.sibling].append(
                struck if self._console.is_terminal else f"~~{struck}~~", style=ERASED_STYLE
            )
        if self._live:
            self._live.update(self._page())

    def _answered(self, sibling: int, observation: Observed, *, erased: bool) -> None:
        """A turn ended with calls; where it was erased, all of it is struck through."""
        text, begin = self._samples[sibling], self._turns[sibling]
        calls = "".join(f"\n  {call.name}({call.arguments}) → {call.result}" for call in observation.calls)
        if erased:
            said = text.plain[begin:] + calls
            text = text[:begin]
            text.append(said if self._console.is_terminal else f"~~{said}~~", style=ERASED_STYLE)
        else:
            text.append(calls, style="cyan")
        text.append("\n")
        self._samples[sibling], self._turns[sibling] = text, len(text)
        del self._streams[sibling]  # the next turn starts a new text

    def _page(self) -> RenderableType:
        rows: list[RenderableType] = []
        for sibling in sorted(self._samples):
            label = Text(f"[{sibling}] ", style="bold cyan") if len(self._samples) > 1 else Text()
            rows.append(label + self._samples[sibling])
        return Group(*rows)

    def close(self, generations: Sequence[Generation]) -> None:
        """Print the final text and the cost of the erasures."""
        for sibling, stream in self._streams.items():
            self._samples[sibling].append(stream.add((), last=True))
        if self._live:
            self._live.update(self._page())
            self._live.stop()
        else:
            self._console.print(self._page(), soft_wrap=True)
        committed = sum(g.trajectory.committed_tokens for g in generations)
        erased = sum(g.trajectory.erased_tokens for g in generations)
        erasures = sum(g.erased for g in generations)
        ending, r = "" if erasures == 1 else "s", erased / committed
        cost = f"{erasures} segment{ending} erased, {erased} tokens redrawn for {committed} kept (r = {r:.3f})"
        self._console.print(Text(cost, style="dim"))
        if cut := [g.trajectory for g in generations if g.trajectory.finish == "length"]:
            which = "" if len(generations) == 1 else f"{len(cut)} of {len(generations)} answers "
            self._console.print(Text(f"{which}cut off at {max(len(t.ids) for t in cut)} tokens", style="dim"))


if TYPE_CHECKING:
    from e3rl.evaluate.samples import Sample

_EVERY = 30.0  # seconds between lines


class LiveCount:
    """Progress on stderr: a bar on a terminal, elsewhere a line every 30 seconds. For a ``with`` block."""

    def __init__(self, name: str, total: int | None = None) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=self._console, transient=True, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(name, total=total)
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tell(self, text: str, done: int, total: int, unit: str = "") -> None:
        """Update the progress."""
        self._bar.update(self._task, completed=done, total=total or None, description=text)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._told >= _EVERY:
            self._told = now
            print(f"{text}, {done}/{total}{unit}" if total else text, file=sys.stderr, flush=True)


class LiveSamples(LiveCount):
    """Counts samples, their tokens and how many are right."""

    def __init__(self, name: str, total: int) -> None:
        super().__init__(name, total)
        self._name, self._total = name, total
        self._done = self._right = self._tokens = 0
        self._began = time.monotonic()

    def add(self, samples: Sequence[Sample]) -> None:
        """A group has finished."""
        self._done += len(samples)
        self._right += sum(s.correct is True for s in samples)
        self._tokens += sum(s.generated for s in samples)
        self._total = max(self._total, self._done)  # equal-budget samples become known later
        speed = self._tokens / max(time.monotonic() - self._began, 1e-9)
        self.tell(
            f"{self._name}: {self._right / self._done:.3f} right, {speed:.0f} tokens/s",
            self._done,
            self._total,
            " samples",
        )
