"""The in-process engine: any full-attention transformers model over a slot cache (`e3rl.rollout.slot_cache`).

A row's last token is in its ids but not yet in the cache: feeding it gives the next token's logits. The logits at the
start of the row's latest candidate are kept (its *mark*), so that after an erasure the retry draws its first token from
them and no token of the prefix passes through the model again. After a rollback to any other place, the one token
before it is fed once more; `EngineStats.refed_tokens` counts those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from e3rl.errors import SickLogits, UserError
from e3rl.rollout.engine import Row, Sampling
from e3rl.rollout.requests import Request, RowState, check_prompt, check_siblings, find_row
from e3rl.rollout.sampling import SICK, Samples, SamplingRows, sample
from e3rl.rollout.serving import check_exactness, evaluating, require_servable
from e3rl.rollout.slot_cache import SlotModel, packed
from e3rl.rollout.slots import SlotMap
from e3rl.rollout.weights import copy_weights
from e3rl.types import Candidate, Draw


@dataclass(slots=True)
class EngineStats:
    """What the engine has done so far. Erasing must add nothing to ``prompt_tokens`` and ``refed_tokens``."""

    prompt_tokens: int = 0  # run through the model by prefill, once per group
    decode_steps: int = 0  # forward passes that decode
    decode_row_steps: int = 0  # tokens run through the model by those
    sampled_tokens: int = 0
    refed_tokens: int = 0  # decode row steps whose token had been in the cache before
    appended_tokens: int = 0  # run through the model to take up rows that were generated before
    moved_tokens: int = 0  # cache positions copied to pack rows
    peak_tokens: int = 0  # most tokens held at once
    kv_bytes: int = 0  # memory of the cache: fixed from the first prompt on


class _Mark(NamedTuple):
    """Logits of the token at index ``position`` of a row, given everything before it."""

    position: int
    logits_V: Tensor


@dataclass(slots=True, eq=False)
class _SlotRow(RowState):
    cached: int = 0  # leading tokens whose keys are in the slot
    mark: _Mark | None = None  # stale after a rollback below it, but replaced before the row is that long again

    @property
    def total(self) -> int:
        """All tokens, those of an open request included."""
        return len(self.ids) + (len(self.request.ids) if self.request else 0)

    @property
    def last_id(self) -> int:
        return self.request.ids[-1] if self.request and self.request.ids else self.ids[-1]

    @property
    def next_logits_V(self) -> Tensor | None:
        """The logits of the next token, where the mark holds them."""
        return self.mark.logits_V if self.mark and self.mark.position == self.total else None


class TorchEngine:
    """Decodes up to ``max_rows`` rows together and holds up to ``cache_rows`` in a cache of fixed size.

    The model is shared with whoever trains it in the same process. Implements `e3rl.rollout.engine.Engine`.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_ids: Sequence[int],
        max_rows: int,
        cache_rows: int,
        max_length: int,
        policy_version: int = 0,
    ) -> None:
        if not 1 <= max_rows <= cache_rows:
            raise UserError(f"max_rows = {max_rows} must be at least 1 and at most cache_rows = {cache_rows}")
        require_servable(model)
        check_exactness(model)
        self.policy_version = policy_version
        self.stats = EngineStats()
        self._model = model
        self._slot_model = SlotModel(model, cache_rows, max_length)
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        self._eos_ids = frozenset(eos_ids)
        self._max_rows, self._cache_rows, self._max_length = max_rows, cache_rows, max_length
        self._rows: dict[Row, _SlotRow] = {}
        self._open: dict[Row, _SlotRow] = {}  # rows with an open request, oldest first
        self._slots: SlotMap[_SlotRow] = SlotMap(cache_rows)
        self._handles = count()
        self._sick = False  # some slot may hold NaN

    def free_rows(self) -> int:
        """How many more rows `prefill` could create now."""
        return self._slots.free

    @torch.inference_mode()
    def prefill(self, prompt_ids: Sequence[int], siblings: int) -> list[Row]:
        """Run a prompt through the model once; its siblings copy its keys and share its last logits."""
        check_prompt(prompt_ids, self._vocabulary, self._max_length)
        check_siblings(siblings, self._cache_rows, self.free_rows())
        length = len(prompt_ids)
        rows = [_SlotRow(length, list(prompt_ids), cached=length) for _ in range(siblings)]
        first, *others = [self._slots.take(row) for row in rows]
        try:
            with evaluating(self._model):
                mark = _Mark(length, self._slot_model.prefill(prompt_ids, first))
        except BaseException:
            for row in rows:
                self._slots.give_back(row)
            raise
        self._slot_model.cache.copy(first, others, length)
        for row in rows:
            row.mark = mark
        handles = [Row(next(self._handles)) for _ in rows]
        self._rows.update(zip(handles, rows, strict=True))
        self.stats.prompt_tokens += length
        self.stats.kv_bytes = self._slot_model.cache.bytes
        self._count_held_tokens()
        return handles

    def length(self, row: Row) -> int:
        """Generated tokens that the row holds, without those of an open request."""
        return self._row(row).length

    def extend(self, row: Row, tokens: int, draw: Draw, sampling: Sampling) -> None:
        """Queue a request for a candidate of up to ``tokens`` tokens."""
        state = self._row(row)
        state.open_request(tokens, draw, sampling, self._max_length)
        self._open[row] = state

    def append(self, row: Row, ids: Sequence[int]) -> None:
        """Continue the row by tokens that were generated before: their keys come out as if it had been here."""
        self._row(row).append(ids, self._vocabulary, self._max_length)

    def poll(self) -> list[tuple[Row, Candidate]]:
        """Decode the oldest requests together, up to max_rows, until at least one is complete; return all that are."""
        active = dict(list(self._open.items())[: self._max_rows])
        if not active:
            return []
        with torch.inference_mode(), evaluating(self._model):
            self._catch_up([row for row in active.values() if row.cached < len(row.ids) - 1])
            front = self._pack(list(active.values()))
            self._draw_first_tokens(front)
            if not any(row.open.complete(self._eos_ids) for row in front):
                self._decode(front)
        self._count_held_tokens()
        done = [handle for handle, row in active.items() if row.open.complete(self._eos_ids)]
        return [(handle, self._open.pop(handle).close_request(self._eos_ids)) for handle in done]

    def rollback(self, row: Row, length: int) -> None:
        """Drop generated tokens beyond ``length``: the row's keys stay where they are and are no longer looked at."""
        state = self._row(row)
        state.truncate(length)
        state.cached = min(state.cached, state.total)

    @torch.inference_mode()
    def release(self, row: Row) -> None:
        """Forget the row, with its open request if it has one; its slot is free at once."""
        state = self._row(row)
        del self._rows[row]
        self._open.pop(row, None)
        slot = self._slots.give_back(state)
        if self._sick:
            self._slot_model.cache.scrub(slot)

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy new weights into the model; those that are the model's own tensors are there already."""
        if self._rows:
            raise ValueError(
                f"{len(self._rows)} rows are held: their keys belong to the old weights; release them first"
            )
        copy_weights(self._model, weights)
        self.policy_version = version
        self._sick = False

    def _row(self, row: Row) -> _SlotRow:
        return find_row(self._rows, row)

    def _pack(self, rows: list[_SlotRow]) -> list[_SlotRow]:
        """Bring the rows into the first slots, so that a decode step reads a slice of the cache; in slot order."""
        for row, source, target, evicted in self._slots.pack(rows):
            if evicted is None:
                self._slot_model.cache.copy(source, [target], row.cached)
                self.stats.moved_tokens += row.cached
            else:
                self._slot_model.cache.swap(source, target, max(row.cached, evicted.cached))
                self.stats.moved_tokens += row.cached + evicted.cached
        return sorted(rows, key=self._slots.slot)

    def _catch_up(self, behind: list[_SlotRow]) -> None:
        """Decode appended tokens into the cache, one at a time as when they were drawn, all but each row's last."""
        while rows := [row for row in behind if row.cached < len(row.ids) - 1]:
            rows = self._pack(rows)
            ids_S, positions_S = (
                torch.tensor(values, device=self._slot_model.device)
                for values in ([row.ids[row.cached] for row in rows], [row.cached for row in rows])
            )
            self._slot_model.decode(ids_S, positions_S, max(row.cached for row in rows))
            for row in rows:
                row.cached += 1
            self.stats.appended_tokens += len(rows)

    def _draw_first_tokens(self, rows: list[_SlotRow]) -> None:
        """The first token of candidates whose mark still stands: no forward pass."""
        marked = {row: logits_V for row in rows if (logits_V := row.next_logits_V) is not None}
        if not marked:
            return
        draws = _Draws(list(marked), steps=1, device=self._slot_model.device)
        try:
            self._append(list(marked), draws.sample(torch.stack(list(marked.values()))))
        finally:
            draws.deliver()

    def _decode(self, rows: list[_SlotRow]) -> None:
        """Step all rows, which lie in the slots 0..len(rows)-1, until at least one request is complete."""
        device = self._slot_model.device
        steps = min(row.open.remaining for row in rows)
        last = max(row.total for row in rows) - 1
        ids_S = torch.tensor([row.last_id for row in rows], device=device)
        positions_S = torch.tensor([row.total - 1 for row in rows], device=device)
        draws = _Draws(rows, steps, device)
        self.stats.refed_tokens += sum(row.cached == row.total for row in rows)
        try:
            for step in range(steps):
                logits_SV = self._slot_model.decode(ids_S, positions_S + step, last + step)
                self._count_step(rows)
                if step == 0:
                    self._mark(rows, logits_SV)
                samples = draws.sample(logits_SV)
                self._append(rows, samples)
                if any(row.open.complete(self._eos_ids) for row in rows):
                    return
                ids_S = samples.ids_S
        finally:
            draws.deliver()

    def _count_step(self, rows: list[_SlotRow]) -> None:
        self.stats.decode_steps += 1
        self.stats.decode_row_steps += len(rows)
        for row in rows:
            row.cached = row.total

    def _mark(self, rows: list[_SlotRow], logits_SV: Tensor) -> None:
        """Keep the logits of rows that are about to draw the first token of a candidate."""
        for row, logits_V in zip(rows, logits_SV, strict=True):
            if not row.open.ids:
                row.mark = _Mark(row.total, logits_V.clone())

    def _append(self, rows: list[_SlotRow], samples: Samples) -> None:
        ids = samples.ids_S.tolist()
        if SICK in ids:
            self._sick = True
            raise SickLogits(rows[ids.index(SICK)].open.draw)
        for row, i in zip(rows, ids, strict=True):
            row.open.ids.append(i)
        self.stats.sampled_tokens += len(ids)

    def _count_held_tokens(self) -> None:
        self.stats.peak_tokens = max(self.stats.peak_tokens, sum(row.total for row in self._rows.values()))


class _Draws:
    """The next ``steps`` draws of some rows, with settings and random numbers on the device beforehand.

    What is measured stays on the device until `deliver` hands it to the requests, for all steps at once.
    """

    def __init__(self, rows: list[_SlotRow], steps: int, device: torch.device) -> None:
        self._requests: list[Request] = [row.open for row in rows]
        self._spare = packed(len(rows)) - len(rows)
        drawn = self._requests + self._requests[:1] * self._spare
        self._settings = SamplingRows.of([request.sampling for request in drawn], device)
        numbers_ST = np.stack([r.uniforms[len(r.ids) : len(r.ids) + steps] for r in drawn])
        self._numbers_TS = torch.from_numpy(numbers_ST.T.copy()).to(device)
        self._samples: list[Samples] = []

    def sample(self, logits_SV: Tensor) -> Samples:
        """One token per row."""
        padded_SV = torch.nn.functional.pad(logits_SV, (0, 0, 0, self._spare)) if self._spare else logits_SV
        samples = sample(padded_SV, self._settings, self._numbers_TS[len(self._samples)])
        samples = Samples(*(field[: len(self._requests)] for field in samples))
        self._samples.append(samples)
        return samples

    def deliver(self) -> None:
        """Give the requests the measures of the tokens that they have taken."""
        if not self._samples:
            return
        together = Samples(*(torch.cat(field) for field in zip(*self._samples, strict=True))).measures()
        for index, request in enumerate(self._requests):
            taken = len(request.ids) - len(request.measures)
            request.measures += together[index :: len(self._requests)][:taken]
