"""The text of each token, such that the pieces of a response add up to its text."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BROKEN = "\ufffd"  # what a decoder emits for an incomplete character


class Pieces:
    """Splits token ids into pieces of text. Caches each token's text, so that a token costs one array look-up."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: list[str] = []
        self._codes: dict[str, int] = {}  # position of a piece in `_texts`
        self._inner = np.full(1, -1)  # by token: the code of its text after other tokens; -1: not cached yet
        self._first: dict[int, int] = {}  # by token: the code of its text at the start of a response
        self._runs: dict[tuple[int, ...], list[int]] = {}  # codes of tokens that form characters together

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def split(self, ids: Sequence[int]) -> list[str]:
        """One piece for each token. If a character takes several tokens, the last has it and the others are empty."""
        _, pieces = self.columns(np.array(ids, np.int32), np.array([0, len(ids)]))
        found: list[str] = pieces.to_pylist()
        return found

    def columns(self, ids: np.ndarray, offsets: np.ndarray) -> tuple[pa.Array, pa.Array]:
        """The text of each candidate, and the piece of each token of all; candidate n has ``ids[offsets[n]:offsets[n + 1]]``."""
        bounds = offsets.tolist()
        texts = pa.array([self.decode(ids[a:b].tolist()) for a, b in itertools.pairwise(bounds)], pa.string())
        codes = self._coded(ids, [a for a, b in itertools.pairwise(bounds) if a < b])
        pieces = self._pieces(codes)
        whole = pc.equal(pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pieces), ""), texts)
        wrong = np.flatnonzero(~whole.to_numpy(zero_copy_only=False).astype(bool))
        for n in wrong.tolist():  # a token's text depends on its neighbours in another way
            here = slice(bounds[n], bounds[n + 1])
            codes[here] = self._split_in_context(ids[here].tolist())
        return texts, self._pieces(codes) if len(wrong) else pieces

    def _pieces(self, codes: np.ndarray) -> pa.Array:
        return pa.array(self._texts, pa.string()).take(pa.array(codes))

    def _coded(self, ids: np.ndarray, starts: Sequence[int]) -> np.ndarray:
        """The code of each token's piece. A candidate's first token is a separate case: some tokenizers drop its space."""
        codes = self._inside(ids)
        codes[list(starts)] = [self._code_at_start(t) for t in ids[list(starts)].tolist()]
        broken = np.array([BROKEN in text for text in self._texts], bool)[codes]
        edges = np.zeros(len(ids) + 1, bool)
        edges[[0, len(ids), *starts]] = True
        edges[1:-1] |= broken[1:] != broken[:-1]
        where = np.flatnonzero(edges).tolist()
        for a, b in itertools.pairwise(where):
            if broken[a]:
                codes[a:b] = self._run(tuple(ids[a:b].tolist()))
        return codes

    def _code(self, text: str) -> int:
        if text not in self._codes:
            self._codes[text] = len(self._texts)
            self._texts.append(text)
        return self._codes[text]

    def _inside(self, ids: np.ndarray) -> np.ndarray:
        """The text of each token after others: the second half of the token decoded twice in a row."""
        missing = ids.max(initial=0) + 1 - len(self._inner)
        if missing > 0:
            self._inner = np.concatenate([self._inner, np.full(missing, -1)])
        for token in np.unique(ids[self._inner[ids] < 0]).tolist():
            self._inner[token] = self._code(self.decode([token, token])[len(self.decode([token])) :])
        return self._inner[ids]

    def _code_at_start(self, token: int) -> int:
        if token not in self._first:
            self._first[token] = self._code(self.decode([token]))
        return self._first[token]

    def _run(self, ids: tuple[int, ...]) -> list[int]:
        if ids not in self._runs:
            self._runs[ids] = self._split_in_context(ids)
        return self._runs[ids]

    def _split_in_context(self, ids: Sequence[int]) -> list[int]:
        """The codes of tokens whose pieces differ from the tokens decoded alone, found token by token."""
        codes: list[int] = []
        start = told = 0  # ids[start:told] is the last piece found, the context of the next one
        for end in range(1, len(ids) + 1):
            text = self.decode(ids[start:end])
            if text.endswith(BROKEN) and end < len(ids):
                codes.append(self._code(""))
                continue
            codes.append(self._code(text[len(self.decode(ids[start:told])) :]))
            start, told = told, end
        return codes


pieces_of = functools.lru_cache(maxsize=4)(Pieces)
"""The `Pieces` of a tokenizer, built once."""
