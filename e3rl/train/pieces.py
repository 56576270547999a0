"""The text of each token, such that the pieces of a response add up to its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what a decoder puts where bytes do not make a character yet


class Pieces:
    """Splits token ids into pieces of text. Remembers what a token says, so that most cost a look-up."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def split(self, ids: Sequence[int]) -> list[str]:
        """One piece a token; a token that only begins a character has an empty one, its last token the character."""
        if not ids:
            return []
        # The first token stands apart: some tokenizers drop a space at the start of a text.
        pieces = [self.decode(ids[:1]), *(self._piece(i) for i in ids[1:])]
        return pieces if "".join(pieces) == self.decode(ids) else self._split_in_context(ids)

    def _piece(self, token: int) -> str:
        """What the token adds to a text: its second half when written twice."""
        if token not in self._known:
            self._known[token] = self.decode([token, token])[len(self.decode([token])) :]
        return self._known[token]

    def _split_in_context(self, ids: Sequence[int]) -> list[str]:
        pieces: list[str] = []
        start = told = 0  # ids[start:told] is the last piece that was told, the context of the next one
        for end in range(1, len(ids) + 1):
            text = self.decode(ids[start:end])
            if text.endswith(BROKEN) and end < len(ids):
                pieces.append("")
                continue
            pieces.append(text[len(self.decode(ids[start:told])) :])
            start, told = told, end
        return pieces
