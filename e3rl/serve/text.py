"""Committed segments become text: whole characters only, nothing from a stop string on, and tool calls apart."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from e3rl.data.toolcalls import ToolCall, ToolCallFormat, parse_tool_calls
from e3rl.serve.messages import ToolChoice

_HALF_CHARACTER = "\ufffd"


class TextStream:
    """The text of one sample as it grows. What might yet turn out otherwise is held back.

    Once ``stopped`` by a stop string, ``kept`` is how many tokens it took to write it.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str], *, keep_stop: bool = False, keep_special: bool = False
    ) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._keep_stop, self._keep_special = keep_stop, keep_special
        self._ids: list[int] = []
        self._sent = 0
        self.stopped: str | None = None
        self.kept = 0

    def add(self, ids: Sequence[int], *, last: bool) -> str:
        """The text that became certain with these tokens; ``last`` says that no more will come."""
        before = len(self._ids)
        self._ids += ids
        text = self._decode(self._ids)
        found = _first_stop(text, self._stops)
        if found is not None:
            at, self.stopped = found
            end = at + len(self.stopped) if self._keep_stop else at
            self.kept = self._tokens_until(self.stopped, before)
        elif last:
            end = len(text)
        else:
            whole = text.rstrip(_HALF_CHARACTER)
            end = len(whole) - max((_begun(whole, stop) for stop in self._stops), default=0)
        certain = text[self._sent : max(end, self._sent)]
        self._sent += len(certain)
        return certain

    def would_add(self, ids: Sequence[int]) -> str:
        """The text that these tokens would stand for here, half characters included; nothing is kept of them."""
        return self._decode([*self._ids, *ids])[self._sent :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=not self._keep_special))

    def _tokens_until(self, stop: str, before: int) -> int:
        """The least number of tokens whose text holds ``stop``, more than ``before``."""
        counts = range(before + 1, len(self._ids))
        place = bisect.bisect_left(counts, True, key=lambda n: stop in self._decode(self._ids[:n]))
        return before + 1 + place


@dataclass
class CallStream:
    """Text that may hold tool calls: what is certainly none goes on, and the calls come with the end."""

    form: ToolCallFormat
    choice: ToolChoice
    text: str = ""
    sent: int = 0

    def add(self, text: str, *, last: bool) -> tuple[str, list[ToolCall]]:
        """The text to show now, and the calls, where this was the last."""
        self.text += text
        calls: list[ToolCall] = []
        if last:
            visible, calls = parse_tool_calls(self.text, self.form, self.choice.tools)
            calls = calls if self.choice.parallel else calls[:1]
        else:
            visible = self._before_calls()
        shown = visible[self.sent :]
        self.sent += len(shown)
        return shown, calls

    def _before_calls(self) -> str:
        """What comes before anything that may be a call."""
        opening = self.form.opening
        if not opening:  # the whole answer may be one
            begun = self.text.lstrip()
            return "" if not begun or begun[0] in "{[<" else self.text
        at = self.text.find(opening)
        end = at if at >= 0 else len(self.text) - _begun(self.text, opening)
        return self.text[:end].rstrip()


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the first stop string begins, and which it is."""
    found = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found, default=None)


def _begun(text: str, mark: str) -> int:
    """Characters at the end of ``text`` with which ``mark`` might begin."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
