"""The in-process engine: any transformers model that attends to keys and values, or keeps recurrent states, over a slot cache
(`e3rl.engine.torch.cache`).

A row's last token is in its ids but not yet in the cache: feeding it gives the next token's logits. The logits at the
start of the row's latest candidate are kept (its *mark*), so that after an erasure the retry draws its first token from
them and no token of the prefix passes through the model again. After a rollback to any other place, the one token
before it is fed once more; `EngineStats.refed_tokens` counts those. Recurrent states are kept with the logits: they go back
to a mark, and after a rollback to any other place tokens since the mark, or all, are run through the model again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from e3rl.config import RolloutConfig
from e3rl.engine.protocol import LogitsHook, Row, Sampling
from e3rl.engine.requests import check_prompt, check_siblings, find_row
from e3rl.engine.torch.decode import READ_AFTER, Marks, SlotRow, StepDraws, StepPart, WaitingPrompts
from e3rl.engine.torch.model import check_exactness, require_servable, slot_model
from e3rl.engine.torch.storage import MIB, SlotMap, StepRows, bucketed, packed, rows_within
from e3rl.engine.torch.threads import Crew, Division, Pace, divided, operation_threads
from e3rl.errors import NonFiniteLogits, UserError
from e3rl.types import Candidate, Draw
from e3rl.weights.model import copy_weights

TURN = 24
"""Round-robin time slice, in tokens, where more requests are open than are decoded together. Requests progress evenly, so few
are left at the end for small batches."""


@dataclass(slots=True)
class EngineStats:
    """What the engine has done so far. Erasing must add nothing to ``prompt_tokens`` and ``refed_tokens``."""

    prompt_tokens: int = 0  # run through the model by prefill, once per group
    decode_steps: int = 0  # forward passes that decode
    decode_row_steps: int = 0  # tokens run through the model by those
    filling_row_steps: int = 0  # padding rows of those passes; their results are dropped
    sampled_tokens: int = 0
    refed_tokens: int = 0  # decode row steps of tokens that had been in the cache before
    appended_tokens: int = 0  # run through the model to restore rows that were generated before
    moved_tokens: int = 0  # cache positions copied to pack rows
    kv_bytes: int = 0  # memory of the cache: fixed from the first prompt on, within rollout.kv_budget


class TorchEngine:
    """Decodes up to ``max_rows`` rows together and holds up to ``cache_rows`` in a cache of fixed size.

    The model is shared with whoever trains it in the same process. Implements `e3rl.engine.protocol.Engine`.
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
        kv_budget: int = 0,
        group: int = 1,
    ) -> None:
        if not 1 <= max_rows <= cache_rows:
            raise UserError(f"max_rows = {max_rows} must be at least 1 and at most cache_rows = {cache_rows}")
        require_servable(model)
        row_bytes = check_exactness(model).of(max_length)
        cache_rows = rows_within(kv_budget, row_bytes, cache_rows, group, bucketed(max_length))
        self.policy_version = policy_version
        self.stats = EngineStats()
        self._model = model
        self._slot_model = slot_model(model, cache_rows, max_length)
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        self._eos_ids = frozenset(eos_ids)
        self._max_rows, self._cache_rows, self._max_length = min(max_rows, cache_rows), cache_rows, max_length
        self._rows: dict[Row, SlotRow] = {}
        self._open: dict[Row, SlotRow] = {}  # rows with an open request, the next turn's first
        self._slots: SlotMap[SlotRow] = SlotMap(cache_rows)
        self._marks = Marks(cache_rows)
        self._prompts = WaitingPrompts()
        self._crew = Crew()
        self._interrupted = threading.Event()
        self._numbers = list(range(cache_rows))  # that no row has
        self._handles = count()
        self._may_hold_nan = False  # some slot may hold NaN
        self._read_after = 1 if self._slot_model.device.type == "cpu" else READ_AFTER

    @staticmethod
    def own_settings(rollout: RolloutConfig) -> dict[str, Any]:
        """Settings of a run that only this engine has."""
        return {"kv_budget": rollout.kv_budget * MIB, "group": rollout.num_generations}

    def free_rows(self) -> int:
        """How many more rows `prefill` could create now."""
        return self._slots.free

    @torch.inference_mode()
    def prefill(self, prompt_ids: Sequence[int], siblings: int) -> list[Row]:
        """Run a prompt through the model once, at the next `poll` where others may run beside it; its siblings copy its keys and
        share its last logits."""
        check_prompt(prompt_ids, self._vocabulary, self._max_length)
        check_siblings(siblings, self._cache_rows, self.free_rows())
        rows = [SlotRow(len(prompt_ids), list(prompt_ids)) for _ in range(siblings)]
        for row in rows:
            self._slots.take(row)
            row.number = self._numbers.pop()
        try:
            if not self._rows:
                self._slot_model.refresh()
            if self._slot_model.packs(len(prompt_ids)):
                self._prompts.add(rows)
            else:
                self._prompt_done(rows, self._slot_model.prefill(prompt_ids, self._slots.slot(rows[0])))
        except BaseException:
            for row in rows:
                self._numbers.append(row.number)
                self._slots.give_back(row)
            raise
        handles = [Row(next(self._handles)) for _ in rows]
        self._rows.update(zip(handles, rows, strict=True))
        self.stats.kv_bytes = self._slot_model.storage.bytes
        return handles

    def length(self, row: Row) -> int:
        """Generated tokens that the row holds, without those of an open request."""
        return self._row(row).length

    def extend(self, row: Row, tokens: int, draw: Draw, sampling: Sampling, hook: LogitsHook | None = None) -> None:
        """Queue a request for a candidate of up to ``tokens`` tokens."""
        state = self._row(row)
        state.open_request(tokens, draw, sampling, self._max_length, hook)
        self._open[row] = state

    def append(self, row: Row, ids: Sequence[int]) -> None:
        """Continue the row by tokens that were generated before; their keys are computed as in decoding."""
        self._row(row).append(ids, self._vocabulary, self._max_length)

    def drawn(self, row: Row, after: int) -> tuple[list[int], list[float]]:
        """Ids and log-probabilities of the row's open request, without its first ``after`` tokens."""
        return self._row(row).drawn(after)

    def interrupt(self) -> None:
        """The poll in progress, or else the next one, returns after a step."""
        self._interrupted.set()

    @torch.inference_mode()
    def poll(self, steps: int = 0) -> list[tuple[Row, Candidate]]:
        """Decode requests in turns, up to max_rows together, until one is complete, an interrupt, or ``steps``; return the
        complete ones."""
        done: list[Row] = []
        try:
            if self._open:
                for rows, logits_V in self._prompts.run(self._slot_model, self._slots.slot, self._crew):
                    self._prompt_done(rows, logits_V)
            while self._open and not done:
                active = dict(islice(self._open.items(), self._max_rows))
                division = self._slot_model.division(len(active))
                if parts := self._next_parts(list(active.values()), division, steps):
                    begun = {handle: row.open.turns(TURN) for handle, row in active.items()}
                    pace = Pace(len(parts), parts[0].steps, self._interrupted)
                    beside = self._crew.beside([partial(part.run, pace) for part in parts[1:]], division.threads)
                    with self._delivering(parts), beside:
                        parts[0].run(pace)
                    for handle, row in active.items():
                        if row.open.turns(TURN) > begun[handle]:
                            self._open[handle] = self._open.pop(handle)  # to the end of the queue
                drawn = active if parts else self._open
                done = [handle for handle, row in drawn.items() if row.open.complete(self._eos_ids)]
                if steps or self._interrupted.is_set():
                    break
        except NonFiniteLogits:
            self._may_hold_nan = True
            raise
        finally:
            self._interrupted.clear()
        return [(handle, self._open.pop(handle).close_request(self._eos_ids)) for handle in done]

    def rollback(self, row: Row, length: int) -> None:
        """Drop generated tokens beyond ``length``. The row's keys stay in memory and are masked out."""
        state = self._row(row)
        state.truncate(length)
        state.stale |= state.cached > state.total
        state.cached = min(state.cached, state.total)
        if state.marked > state.total:
            state.marked = -1

    @torch.inference_mode()
    def release(self, row: Row) -> None:
        """Forget the row, with its open request if it has one; its slot is free at once."""
        state = self._row(row)
        del self._rows[row]
        self._open.pop(row, None)
        self._prompts.remove(state)
        slot = self._slots.give_back(state)
        self._numbers.append(state.number)
        if self._may_hold_nan:
            self._slot_model.storage.scrub(slot)

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy new weights into the model; those that are the model's own tensors are there already."""
        if self._rows:
            raise ValueError(
                f"{len(self._rows)} rows are held: their keys belong to the old weights; release them first"
            )
        copy_weights(self._model, weights)
        self._slot_model.take_weights()
        self.policy_version = version
        self._may_hold_nan = False

    def _next_parts(self, rows: list[SlotRow], division: Division, most: int) -> list[StepPart]:
        """Draw what needs no forward pass; if that completes no request, the parts in which ``rows`` are to be decoded. With
        ``most``, for so many steps, and none where something was drawn: it is to be told at once."""
        with operation_threads(division.threads):
            begun = self._draw_first_tokens()
            if (most and begun) or any(row.open.complete(self._eos_ids) for row in begun):
                return []
            if self._slot_model.storage.states:
                self._restore_states([row for row in rows if row.stale or row.cached == row.total])
            self._catch_up([row for row in rows if row.cached < row.total - 1])
            rows = self._pack(rows)
            first = self._slots.slot(rows[0])
            steps = min(row.open.remaining for row in rows)
            if len(self._open) > len(rows):  # others wait: a turn
                steps = min(steps, TURN)
            if most:
                steps = min(steps, most)
            self.stats.refed_tokens += sum(row.cached == row.total for row in rows)
            rest = (self._slot_model, self._marks, self._eos_ids, steps, self._read_after)
            return [StepPart(rows[part], first + part.start, *rest) for part in divided(len(rows), division.parts)]

    def _prompt_done(self, rows: list[SlotRow], logits_V: Tensor) -> None:
        """The prompt of these siblings has run in the first one's slot."""
        slots, length = [self._slots.slot(row) for row in rows], rows[0].prompt_length
        self._slot_model.storage.copy(slots[0], slots[1:], length)
        self._slot_model.storage.keep_states(slots, [row.number for row in rows])
        self._marks.keep(rows, logits_V.expand(len(rows), -1))
        for row in rows:
            row.cached = row.marked = length
        self.stats.prompt_tokens += length

    def _row(self, row: Row) -> SlotRow:
        return find_row(self._rows, row)

    def _pack(self, rows: list[SlotRow]) -> list[SlotRow]:
        """Bring the rows into neighbouring slots, so that a decode step reads a slice of the cache; in slot order."""
        starts = range(0, self._cache_rows - len(rows) + 1, packed(self._max_rows))
        for row, source, target, evicted in self._slots.pack(rows, self._slots.fullest(rows, starts)):
            if evicted is None:
                self._slot_model.storage.copy(source, [target], row.cached)
                self.stats.moved_tokens += row.cached
            else:
                self._slot_model.storage.swap(source, target, max(row.cached, evicted.cached))
                self.stats.moved_tokens += row.cached + evicted.cached
        return sorted(rows, key=self._slots.slot)

    def _restore_states(self, rows: list[SlotRow]) -> None:
        """Recurrent states of tokens that the rows hold, short of the last: those at the mark where that is among them, else
        of all tokens, run through the model again."""
        storage = self._slot_model.storage
        near = [row for row in rows if 0 <= row.marked < row.total]
        storage.restore_states([self._slots.slot(row) for row in near], [row.number for row in near])
        for row in rows:
            had, row.stale, row.cached = row.cached, False, row.marked if row in near else row.total - 1
            if row not in near:
                self._run_again(row)
            self.stats.refed_tokens += max(0, min(had, row.total - 1) - (row.marked if row in near else 0))

    def _run_again(self, row: SlotRow) -> None:
        slot = self._slots.slot(row)
        if row.cached:
            self._slot_model.prefill(row.tokens()[: row.cached], slot)
        else:
            self._slot_model.storage.clear_states(slot)

    def _catch_up(self, behind: list[SlotRow]) -> None:
        """Decode appended tokens into the cache, one at a time as when they were drawn, all but each row's last."""
        while rows := [row for row in behind if row.cached < row.total - 1]:
            rows = self._pack(rows)
            ids, positions = [row.tokens()[row.cached] for row in rows], [row.cached for row in rows]
            model, first = self._slot_model, self._slots.slot(rows[0])
            model.decode(StepRows(ids, positions, model.storage, model.device, first))
            for row in rows:
                row.cached += 1
            self.stats.appended_tokens += len(rows)

    def _draw_first_tokens(self) -> list[SlotRow]:
        """Draw the first token of candidates whose mark is valid, without a forward pass; return their rows."""
        marked = [row for row in self._open.values() if not row.open.ids and row.marked == len(row.ids)]
        if not marked:
            return marked
        spare = packed(len(marked)) - len(marked)
        draws = StepDraws([row.open for row in marked], 1, spare, self._slot_model.device, self._eos_ids)
        draws.sample(self._marks.of(marked + marked[:1] * spare))
        draws.read()
        self.stats.sampled_tokens += draws.deliver()
        return marked

    @contextmanager
    def _delivering(self, parts: list[StepPart]) -> Iterator[None]:
        """On exit give the requests what was drawn for them, also of the steps before one that failed."""
        try:
            yield
        finally:
            for part in parts:
                self.stats.sampled_tokens += part.close()
                self.stats.decode_row_steps += part.fed * len(part.rows)
                self.stats.filling_row_steps += part.fed * part.spare
            self.stats.decode_steps += max(part.fed for part in parts)
