"""Committed segments become text: whole characters only, nothing from a stop string on, and tool calls apart."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from e3rl.data.toolcalls import ToolCall, ToolCallFormat, parse_tool_calls
from e3rl.serve.messages import ToolChoice

_HALF_CHARACTER = "\ufffd"
_WINDOW = 32
"""Tokens before new ones that are decoded again with them: what a token stands for may depend on those before it."""
_MOST_HALVES = 256
"""Characters that are held back for want of their other half. So many together are no character's."""


class TextStream:
    """The text of one sample as it grows. Text that later tokens may change is held back.

    Once ``stopped`` by a stop string, ``kept`` is how many tokens it took to write it. The work for a token doesn't grow with
    the number of those before it.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str], *, keep_stop: bool = False, keep_special: bool = False
    ) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._keep_stop, self._keep_special = keep_stop, keep_special
        self._ids: list[int] = []
        self._read = self._window = 0  # tokens that ended in whole characters when they came; where their window begins
        self._known = ""  # text of that window
        self._pending = ""  # their text that is not sent
        self._sent = 0  # characters that are sent of it and of what follows it
        self.stopped: str | None = None
        self.kept = 0

    def add(self, ids: Sequence[int], *, last: bool) -> str:
        """The text that became certain with these tokens; ``last`` says that no more will come."""
        before = len(self._ids)
        self._ids += ids
        text = self._pending + self._unread(self._ids)
        found = _first_stop(text, self._stops)
        whole = text.rstrip(_HALF_CHARACTER)
        if len(text) - len(whole) > _MOST_HALVES:
            whole = text
        if found is not None:
            at, self.stopped = found
            end = at + len(self.stopped) if self._keep_stop else at
            self.kept = self._tokens_until(self.stopped, before)
        elif last:
            end = len(text)
        else:
            end = len(whole) - max((_begun(whole, stop) for stop in self._stops), default=0)
        certain = text[self._sent : max(end, self._sent)]
        self._sent += len(certain)
        if whole == text:
            self._settle(text[self._sent :])
        return certain

    def would_add(self, ids: Sequence[int]) -> str:
        """The text that these tokens would add, incomplete characters included; changes no state."""
        return (self._pending + self._unread([*self._ids, *ids]))[self._sent :]

    def _settle(self, pending: str) -> None:
        """All tokens so far stand for whole characters, of which ``pending`` is not sent: later ones are read in a new window."""
        self._pending, self._sent, self._read = pending, 0, len(self._ids)
        for start in range(max(0, self._read - _WINDOW), max(-1, self._read - _WINDOW - 4), -1):
            self._window = start  # not in the middle of a character, whose half would spoil what follows
            self._known = self._decode(self._ids[start : self._read])
            if not self._known.startswith(_HALF_CHARACTER):
                break

    def _unread(self, ids: Sequence[int]) -> str:
        """The text of the tokens behind those that were read."""
        known, text = self._known, self._decode(ids[self._window :])
        if self._window and not (known and text.startswith(known)):  # the window was too narrow
            known, text = self._decode(ids[: self._read]), self._decode(ids)
        return text[len(known) :]

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
            shown = visible[self.sent :]
        else:
            shown = self.text[self.sent : self._end_of_text()].rstrip()
        self.sent += len(shown)
        return shown, calls

    def _end_of_text(self) -> int:
        """Where what is not sent might begin to be a call."""
        opening = self.form.opening
        if not opening:  # the whole answer may be a call
            begun = self.text.lstrip()
            return 0 if not begun or begun[0] in "{[<" else len(self.text)
        at = self.text.find(opening, self.sent)
        return at if at >= 0 else len(self.text) - _begun(self.text, opening)


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the first stop string begins, and which it is."""
    found = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found, default=None)


def _begun(text: str, mark: str) -> int:
    """Characters at the end of ``text`` with which ``mark`` might begin."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
