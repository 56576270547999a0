"""Committed segments become text: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALF_CHARACTER = "\ufffd"


class TextStream:
    """The text of one sample as it grows. What might yet turn out otherwise is held back."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        self._sent = 0
        self.stopped = False

    def add(self, ids: Sequence[int], *, last: bool) -> str:
        """The text that became certain with these tokens; ``last`` says that no more will come."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        end = _first_stop(text, self._stops)
        if end is not None:
            self.stopped = True
        elif last:
            end = len(text)
        else:
            whole = text.rstrip(_HALF_CHARACTER)
            end = len(whole) - _possible_stop(whole, self._stops)
        certain = text[self._sent : max(end, self._sent)]
        self._sent += len(certain)
        return certain

    def would_add(self, ids: Sequence[int]) -> str:
        """The text that these tokens would stand for here, half characters included; nothing is kept of them."""
        return str(self._tokenizer.decode([*self._ids, *ids], skip_special_tokens=True)[self._sent :])


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return min(found, default=None)


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of ``text`` with which a stop string might begin."""
    lengths = (n for stop in stops for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
    return max(lengths, default=0)
