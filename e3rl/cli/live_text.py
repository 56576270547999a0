"""Samples as they grow: committed text, and erased candidates struck through where they stood."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from e3rl.rollout.group import Committed, Erased, Event
from e3rl.serve.text import TextStream

if TYPE_CHECKING:
    from e3rl.generation import Generation

ERASED_STYLE = "red strike dim"


class LiveText:
    """On a terminal the text is drawn while it grows; elsewhere it is printed once, erasures as ~~text~~."""

    def __init__(self, console: Console, prompt: str, tokenizer: Any) -> None:
        self._console = console
        self._samples: defaultdict[int, Text] = defaultdict(Text)
        self._streams: defaultdict[int, TextStream] = defaultdict(lambda: TextStream(tokenizer, ()))
        console.print(Text(prompt, style="dim"))
        self._live = Live(Text(""), console=console, refresh_per_second=12) if console.is_terminal else None
        if self._live:
            self._live.start()

    def observe(self, event: Event) -> None:
        """What to hand to the driver. A character that two segments share appears with its last token."""
        if isinstance(event, Committed):
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

    def _page(self) -> RenderableType:
        rows: list[RenderableType] = []
        for sibling in sorted(self._samples):
            label = Text(f"[{sibling}] ", style="bold cyan") if len(self._samples) > 1 else Text()
            rows.append(label + self._samples[sibling])
        return Group(*rows)

    def close(self, generations: Sequence[Generation]) -> None:
        """Print what is final, and what the erasures cost."""
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
