"""Rows and requests of an in-process engine, random numbers of draws, and what is refused. No tensors, no model."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from e3rl.engine.protocol import LogitsHook, Row, Sampling
from e3rl.engine.sampling import check_sampling
from e3rl.errors import UserError
from e3rl.types import Candidate, Draw

_PERSON = b"e3rl-draw"


def draw_key(draw: Draw) -> int:
    """The draw's 128-bit key. The free text comes last, so that no two draws share an encoding."""
    fields = (draw.seed, draw.step, draw.sibling, draw.segment, draw.attempt, draw.prompt_id)
    encoded = "|".join(map(str, fields)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=16, person=_PERSON).digest(), "little")


def uniforms(draw: Draw, n: int) -> np.ndarray:
    """The first ``n`` numbers of the draw's stream: float64, uniform in [0, 1).

    A longer stream starts with the shorter one. The raw bits of the counter-based generator are turned into floats
    here, since numpy guarantees the former across versions and not the latter.
    """
    raw = np.random.Philox(key=draw_key(draw)).random_raw(n)
    return (raw >> np.uint64(11)) * 2.0**-53


@dataclass(slots=True)
class Request:
    """A candidate that is being generated."""

    tokens: int
    draw: Draw
    sampling: Sampling
    uniforms: np.ndarray
    ids: list[int] = field(default_factory=list)
    measures: list[np.ndarray] = field(
        default_factory=list
    )  # of a token each, or of several as rows: `Samples.measures`
    hook: LogitsHook | None = None
    seen: list[int] = field(
        default_factory=list
    )  # what the hook is shown: the row's generated tokens up to the next draw

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.tokens - len(self.ids)

    def turns(self, tokens: int) -> int:
        """Time slices of so many tokens that it has used."""
        return len(self.ids) // tokens

    def closes(self, number: int, measures: np.ndarray) -> bool:
        """Whether the boundary lies behind its ``number``-th token, of which these are the measures."""
        boundary = self.sampling.boundary
        if boundary is None or number < boundary.least:
            return False
        value = -measures[0] if boundary.measure == "surprise" else measures[1]
        return bool(np.float32(value) > boundary.level)

    def complete(self, eos_ids: Collection[int]) -> bool:
        """It has all its tokens, or its last one ends the sequence or closes the candidate."""
        if self.remaining == 0 or not self.ids:
            return self.remaining == 0
        return self.ids[-1] in eos_ids or self.closes(len(self.ids), np.atleast_2d(self.measures[-1])[-1])

    def candidate(self, eos_ids: Collection[int]) -> Candidate:
        """The finished candidate."""
        measured_MT = np.vstack(self.measures).T.astype(np.float32).astype(np.float64)
        ids, ranks = np.array(self.ids, np.int32), measured_MT[-1].astype(np.int32)
        for array in (ids, measured_MT, ranks):
            array.flags.writeable = False
        return Candidate.wrap(ids, *measured_MT[:-1], ranks, ended=self.ids[-1] in eos_ids)


@dataclass(slots=True, eq=False)
class RowState:
    """A sequence that an engine holds: prompt and generated tokens (those of an open request are in the request)."""

    prompt_length: int
    ids: list[int]
    request: Request | None = None

    @property
    def length(self) -> int:
        """Generated tokens, without those of an open request."""
        return len(self.ids) - self.prompt_length

    @property
    def open(self) -> Request:
        """The open request; there must be one."""
        assert self.request is not None
        return self.request

    def open_request(
        self, tokens: int, draw: Draw, sampling: Sampling, max_length: int, hook: LogitsHook | None = None
    ) -> None:
        """Start a candidate; refuses what can't be generated."""
        if self.request is not None:
            raise ValueError(f"the row already has an open request ({self.request.draw}): poll until it is delivered")
        if tokens < 1:
            raise ValueError(f"a candidate needs at least 1 token, not {tokens}")
        check_sampling(sampling)
        check_fits(self.prompt_length, self.length + tokens, max_length)
        self.request = Request(tokens, draw, sampling, uniforms(draw, tokens), hook=hook)
        if hook is not None:
            self.request.seen = self.ids[self.prompt_length :]

    def close_request(self, eos_ids: Collection[int]) -> Candidate:
        """Move the finished candidate's tokens into the row."""
        candidate = self.open.candidate(eos_ids)
        self.ids += self.open.ids
        self.request = None
        return candidate

    def append(self, ids: Sequence[int], vocabulary: int, max_length: int) -> None:
        """Add tokens as if they had been generated."""
        if self.request is not None:
            raise ValueError(f"the row has an open request ({self.request.draw}): poll until it is delivered")
        check_ids(ids, vocabulary, "what was generated before")
        check_fits(self.prompt_length, self.length + len(ids), max_length)
        self.ids += ids

    def drawn(self, after: int) -> tuple[list[int], list[float]]:
        """Ids and log-probabilities of the open request, without its first ``after`` tokens."""
        ids, logprobs = self.open.ids[after:], list[float]()
        for block in reversed(self.open.measures):  # only the latest: this is asked every few tokens
            if len(logprobs) >= len(ids):
                break
            logprobs[:0] = np.atleast_2d(block)[:, 0].tolist()
        return ids, logprobs[len(logprobs) - len(ids) :]

    def truncate(self, length: int) -> None:
        """Drop generated tokens beyond ``length``."""
        if self.request is not None:
            raise ValueError(f"the row has an open request ({self.request.draw}): poll until it is delivered")
        if not 0 <= length <= self.length:
            raise ValueError(f"can't roll back to {length} generated tokens: the row holds {self.length}")
        del self.ids[self.prompt_length + length :]


S = TypeVar("S")


def find_row(rows: Mapping[Row, S], row: Row) -> S:
    """The state of a row that is held."""
    if row not in rows:
        raise ValueError(f"the engine holds no row {row}: it was released or never made")
    return rows[row]


def check_prompt(ids: Sequence[int], vocabulary: int, max_length: int) -> None:
    """Refuse a prompt that no token could follow."""
    if not ids:
        raise UserError("the prompt is empty: an engine needs at least one token to continue")
    check_ids(ids, vocabulary, "the prompt")
    check_fits(len(ids), 1, max_length)


def check_ids(ids: Sequence[int], vocabulary: int, what: str) -> None:
    """Refuse tokens that the model does not have."""
    bad = next((i for i in ids if not 0 <= i < vocabulary), None)
    if bad is not None:
        raise UserError(f"{what} has token id {bad}, the model's vocabulary has {vocabulary}: wrong tokenizer?")


def check_fits(prompt: int, completion: int, max_length: int) -> None:
    """Refuse prompt and completion that together exceed what a row can hold."""
    if prompt + completion > max_length:
        raise UserError(
            f"a prompt of {prompt} tokens and a completion of {completion} make {prompt + completion}, but a row of "
            f"the engine holds {max_length}: shorten the prompt, lower the completion limit or raise max_length"
        )


def check_siblings(siblings: int, rows: int, free: int) -> None:
    """Refuse a group that does not fit."""
    if siblings < 1:
        raise ValueError(f"a prompt needs at least 1 row, not {siblings}")
    if siblings > rows:
        raise UserError(f"a group of {siblings} siblings can never fit: the engine holds {rows} rows; raise cache_rows")
    if siblings > free:
        raise ValueError(f"{siblings} rows asked for, {free} are free: release rows first")
