"""Samples as they grow: committed text, and erased candidates struck through where they stood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from e3rl.rollout.scheduler import Committed, Erased, Event

if TYPE_CHECKING:
    from e3rl.generation import Generation

ERASED_STYLE = "red strike dim"


class LiveText:
    """On a terminal the text is drawn while it grows; elsewhere it is printed once, erasures as ~~text~~."""

    def __init__(self, console: Console, prompt: str, tokenizer: Any) -> None:
        self._console, self._tokenizer = console, tokenizer
        self._samples: dict[int, Text] = {}
        console.print(Text(prompt, style="dim"))
        self._live = Live(Text(""), console=console, refresh_per_second=12) if console.is_terminal else None
        if self._live:
            self._live.start()

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def observe(self, event: Event) -> None:
        """What to hand to the scheduler."""
        if isinstance(event, Committed):
            text = self._samples.setdefault(event.sibling, Text())
            text.append(self._decode(event.segment.candidate.ids))
        elif isinstance(event, Erased):
            text = self._samples.setdefault(event.sibling, Text())
            struck = self._decode(event.erasure.candidate.ids)
            text.append(struck if self._console.is_terminal else f"~~{struck}~~", style=ERASED_STYLE)
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
        if self._live:
            self._live.stop()
        else:
            self._console.print(self._page(), soft_wrap=True)
        committed = sum(g.trajectory.committed_tokens for g in generations)
        erased = sum(g.trajectory.erased_tokens for g in generations)
        erasures = sum(g.erased for g in generations)
        ending, r = "" if erasures == 1 else "s", erased / committed
        cost = f"{erasures} segment{ending} erased, {erased} tokens redrawn for {committed} kept (r = {r:.3f})"
        self._console.print(Text(cost, style="dim"))
