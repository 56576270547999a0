"""Rows in neighbouring slots that are decoded together for a few steps, in one thread (`e3rl.engine.torch.threads`); prompts that
run together before that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from e3rl.engine.requests import Request, RowState
from e3rl.engine.sampling import NON_FINITE, SamplingRows, sample
from e3rl.engine.torch.model import SlotModel
from e3rl.engine.torch.storage import StepRows
from e3rl.engine.torch.threads import MOST_PARTS, Crew, Pace, passes
from e3rl.errors import NonFiniteLogits


@dataclass(slots=True, eq=False)
class SlotRow(RowState):
    """A sequence whose keys and values are in a slot."""

    number: int = -1  # among the rows held: where its mark is kept
    cached: int = 0  # leading tokens whose keys are in the slot
    marked: int = -1  # which token the mark draws; -1: none
    stale: bool = False  # recurrent states in the slot are of tokens that were dropped

    @property
    def total(self) -> int:
        """All tokens, those of an open request included."""
        return len(self.ids) + (len(self.request.ids) if self.request else 0)

    @property
    def last_id(self) -> int:
        """The latest token."""
        return self.request.ids[-1] if self.request and self.request.ids else self.ids[-1]

    def tokens(self) -> list[int]:
        """All tokens, those of an open request included."""
        return self.ids + self.request.ids if self.request else self.ids


class Marks:
    """Logits at the start of each row's latest candidate; the storage keeps recurrent states beside them."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._logits_SV: Tensor | None = None

    def keep(self, rows: Sequence[SlotRow], logits_SV: Tensor) -> None:
        """``logits_SV`` draw the next token of ``rows``."""
        if self._logits_SV is None:
            self._logits_SV = logits_SV.new_empty((self._rows, logits_SV.shape[1]))
        self._logits_SV[[row.number for row in rows]] = logits_SV
        for row in rows:
            row.marked = row.total

    def of(self, rows: Sequence[SlotRow]) -> Tensor:
        """The logits kept for ``rows``."""
        assert self._logits_SV is not None
        return self._logits_SV[[row.number for row in rows]]


PASS_TOKENS = 512
"""Most tokens of prompts that run in one pass; a longer prompt has one of its own."""


class WaitingPrompts:
    """Prompts that have not run yet, each with the rows of its siblings."""

    def __init__(self) -> None:
        self._waiting: list[list[SlotRow]] = []

    def add(self, rows: list[SlotRow]) -> None:
        """Siblings, which hold a prompt and nothing else."""
        self._waiting.append(rows)

    def remove(self, row: SlotRow) -> None:
        """The row is released."""
        for rows in self._waiting:
            if row in rows:
                rows.remove(row)

    def run(self, model: SlotModel, slot: Callable[[SlotRow], int], crew: Crew) -> list[tuple[list[SlotRow], Tensor]]:
        """Run each prompt in the slot of its first row, several in a pass, the passes in several threads; with the logits that
        follow it, [V]."""
        waiting = [rows for rows in self._waiting if rows]
        if not waiting:
            return []
        threads = torch.get_num_threads()
        parts = min(threads, len(waiting), MOST_PARTS)
        slices = passes([rows[0].prompt_length for rows in waiting], parts, PASS_TOKENS)
        todo, logits = iter(enumerate(slices)), [list[Tensor]()] * len(slices)

        def run() -> None:
            for number, some in todo:  # each pass goes to the thread that asks first
                prompts = [(row.ids[: row.prompt_length], slot(row)) for row, *_ in waiting[some]]
                logits[number] = model.prefill_together(prompts)

        with crew.beside([run] * (parts - 1), threads // parts):
            run()
        self._waiting.clear()
        return list(zip(waiting, chain.from_iterable(logits), strict=True))


READ_AFTER = 16
"""Steps between two reads of drawn tokens from a GPU, since a read waits for the device. Rows that have ended are decoded on
until the next read, and the surplus is dropped. A CPU reads after each step."""


class StepDraws:
    """The next ``steps`` draws of some requests, with settings and random numbers on the device beforehand.

    What is drawn and measured stays on the device until `read`, and goes to the requests by `deliver`. Logits have ``spare``
    padding rows beyond the requests; what is drawn for them is dropped.
    """

    def __init__(
        self, requests: Sequence[Request], steps: int, spare: int, device: torch.device, eos_ids: Collection[int]
    ) -> None:
        self._requests, self._eos_ids = requests, eos_ids
        drawn = [*requests, *[requests[0]] * spare]
        self._settings = SamplingRows.of([request.sampling for request in drawn], device)
        numbers_ST = np.stack([r.uniforms[len(r.ids) : len(r.ids) + steps] for r in drawn])
        self._numbers_TS = torch.from_numpy(numbers_ST.T.copy()).to(device)
        self._hooked = [(index, request) for index, request in enumerate(requests) if request.hook is not None]
        self._drawn = 0
        self._unread: list[Tensor] = []
        self._read: list[np.ndarray] = []  # by step: `Samples.numbers` of the requests
        self._bounded = [request.sampling.boundary is not None for request in requests]
        self._ends = [0] * len(requests)  # which of the steps that were read is a request's last; 0: none yet

    @property
    def hooked(self) -> bool:
        """Whether a request has a hook, which sees what was drawn: then `read` after each step."""
        return bool(self._hooked)

    def sample(self, logits_RV: Tensor) -> Tensor:
        """One token per row, spare rows included, on the device; `NON_FINITE` where a row's logits are not all finite."""
        for index, request in self._hooked:
            assert request.hook is not None
            request.hook(logits_RV[index], request.seen)
        samples = sample(logits_RV, self._settings, self._numbers_TS[self._drawn])
        self._unread.append(samples.numbers())
        self._drawn += 1
        return samples.ids_S

    def read(self) -> bool:
        """Read what was drawn since the last time; whether a request has ended.

        Raises NonFiniteLogits where a request that had not ended got logits that are not all finite; that step and later ones
        are dropped.
        """
        unread, self._unread = self._unread, []
        for numbers_RN in (torch.stack(unread) if len(unread) > 1 else unread[0][None]).cpu().numpy():
            numbers_RN = numbers_RN[: len(self._requests)]
            step = len(self._read) + 1
            for index, token in enumerate(numbers_RN[:, 0].tolist()):
                if self._ends[index]:
                    continue
                if token == NON_FINITE:
                    raise NonFiniteLogits(self._requests[index].draw)
                if token in self._eos_ids or (self._bounded[index] and self._closes(index, step, numbers_RN[index])):
                    self._ends[index] = step
            self._read.append(numbers_RN)
            for index, request in self._hooked:
                request.seen.append(int(numbers_RN[index, 0]))
        return any(self._ends)

    def _closes(self, index: int, step: int, numbers_N: np.ndarray) -> bool:
        request = self._requests[index]
        return request.closes(len(request.ids) + step, numbers_N[1:])

    def deliver(self) -> int:
        """Give the requests their tokens and measures, each up to its end; return the number of tokens."""
        if not self._read:
            return 0
        numbers_STN, delivered = np.stack(self._read, axis=1), 0
        for request, end, numbers_TN in zip(self._requests, self._ends, numbers_STN, strict=True):
            numbers_TN = numbers_TN[: end or None]
            request.ids += numbers_TN[:, 0].astype(int).tolist()
            request.measures.append(numbers_TN[:, 1:])
            delivered += len(numbers_TN)
        return delivered


class StepPart:
    """Decodes ``rows``, which are in the slots from ``first`` on, until its `Pace` is over."""

    def __init__(
        self,
        rows: Sequence[SlotRow],
        first: int,
        model: SlotModel,
        marks: Marks,
        eos_ids: Collection[int],
        steps: int,
        read_after: int,
    ) -> None:
        self.rows = rows
        self.steps = steps  # at most
        self.fed = 0  # tokens of each row run through the model
        self._starts = [row.total - 1 for row in rows]
        self._model, self._marks = model, marks
        self._step_rows = StepRows([row.last_id for row in rows], self._starts, model.storage, model.device, first)
        self.spare = self._step_rows.spare
        self._draws = StepDraws([row.open for row in rows], steps, self.spare, model.device, frozenset(eos_ids))
        self._read_after = 1 if self._draws.hooked else read_after

    def run(self, pace: Pace) -> None:
        """Step until the pace is over."""
        with pace:
            while True:
                logits_RV = self._model.decode(self._step_rows)
                self.fed += 1
                if self.fed == 1:
                    self._mark(logits_RV)
                ids_R = self._draws.sample(logits_RV)
                reads = self.fed % self._read_after == 0 or self.fed == self.steps
                if reads and pace.over(self.fed, ended=self._draws.read()):
                    return
                self._step_rows.advance(ids_R)

    def close(self) -> int:
        """Give the requests what was drawn for them; return the number of tokens."""
        delivered = self._draws.deliver()
        for row, start in zip(self.rows, self._starts, strict=True):
            row.stale = start + self.fed > row.total  # a row that ended was fed on
            row.cached = min(start + self.fed, row.total)
        return delivered

    def _mark(self, logits_RV: Tensor) -> None:
        """Keep the logits of rows that are about to draw the first token of a candidate."""
        chosen = [index for index, row in enumerate(self.rows) if not row.open.ids]
        if chosen:
            rows = [self.rows[index] for index in chosen]
            self._marks.keep(rows, logits_RV[chosen])
            slots = [self._step_rows.first + index for index in chosen]
            self._model.storage.keep_states(slots, [row.number for row in rows])
