"""Rows in neighbouring slots that are decoded together for a few steps, in one thread (`e3rl.engine.torch.threads`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from e3rl.engine.requests import Request, RowState
from e3rl.engine.sampling import NON_FINITE, Samples, SamplingRows, sample
from e3rl.engine.torch.model import SlotModel
from e3rl.engine.torch.storage import StepRows
from e3rl.engine.torch.threads import Pace
from e3rl.errors import NonFiniteLogits


@dataclass(slots=True, eq=False)
class SlotRow(RowState):
    """A sequence whose keys and values are in a slot."""

    number: int = -1  # among the rows held: where its mark is kept
    cached: int = 0  # leading tokens whose keys are in the slot
    marked: int = -1  # which token the mark draws; -1: none

    @property
    def total(self) -> int:
        """All tokens, those of an open request included."""
        return len(self.ids) + (len(self.request.ids) if self.request else 0)

    @property
    def last_id(self) -> int:
        """The latest token."""
        return self.request.ids[-1] if self.request and self.request.ids else self.ids[-1]


class Marks:
    """Logits at the start of each row's latest candidate."""

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


class StepDraws:
    """The next ``steps`` draws of some requests, with settings and random numbers on the device beforehand.

    What is drawn and measured stays on the device until `deliver` hands it to the requests, for all steps at once. Logits
    come with ``spare`` rows more than there are requests; those are drawn for nobody.
    """

    def __init__(self, requests: Sequence[Request], steps: int, spare: int, device: torch.device) -> None:
        self._requests = requests
        drawn = [*requests, *[requests[0]] * spare]
        self._settings = SamplingRows.of([request.sampling for request in drawn], device)
        numbers_ST = np.stack([r.uniforms[len(r.ids) : len(r.ids) + steps] for r in drawn])
        self._numbers_TS = torch.from_numpy(numbers_ST.T.copy()).to(device)
        self._hooked = [(index, request) for index, request in enumerate(requests) if request.hook is not None]
        self._samples: list[Samples] = []
        self._ids: list[list[int]] = []

    @property
    def ids_R(self) -> Tensor:
        """The tokens of the latest step, spare rows included."""
        return self._samples[-1].ids_S

    def sample(self, logits_RV: Tensor) -> list[int]:
        """One token per request; raises NonFiniteLogits, and draws for nobody, where a request's logits are not all finite."""
        for index, request in self._hooked:
            assert request.hook is not None
            request.hook(logits_RV[index], request.seen)
        samples = sample(logits_RV, self._settings, self._numbers_TS[len(self._samples)])
        ids: list[int] = samples.ids_S.tolist()
        ids = ids[: len(self._requests)]
        if NON_FINITE in ids:
            raise NonFiniteLogits(self._requests[ids.index(NON_FINITE)].draw)
        self._samples.append(samples)
        self._ids.append(ids)
        for index, request in self._hooked:
            request.seen.append(ids[index])
        return ids

    def deliver(self) -> int:
        """Give the requests their tokens and measures; how many tokens that is."""
        if not self._samples:
            return 0
        together = Samples(*(torch.stack(field, 1).flatten() for field in zip(*self._samples, strict=True))).measures()
        steps = len(self._ids)
        for index, (request, ids) in enumerate(zip(self._requests, zip(*self._ids, strict=True), strict=True)):
            request.ids += ids
            request.measures += together[index * steps : (index + 1) * steps]
        return steps * len(self._requests)


class StepPart:
    """Decodes ``rows``, which lie in the slots from ``first`` on, until its `Pace` says that it is enough."""

    def __init__(
        self, rows: Sequence[SlotRow], first: int, model: SlotModel, marks: Marks, eos_ids: Collection[int], steps: int
    ) -> None:
        self.rows = rows
        self.steps = steps  # at most
        self.fed = 0  # tokens of each row run through the model
        self._starts = [row.total - 1 for row in rows]
        self._model, self._marks, self._eos_ids = model, marks, frozenset(eos_ids)
        self._step_rows = StepRows([row.last_id for row in rows], self._starts, model.storage, model.device, first)
        self.spare = self._step_rows.spare
        self._draws = StepDraws([row.open for row in rows], steps, self.spare, model.device)

    def run(self, pace: Pace) -> None:
        """Step until it is enough."""
        with pace:
            while True:
                logits_RV = self._model.decode(self._step_rows)
                self.fed += 1
                if self.fed == 1:
                    self._mark(logits_RV)
                ids = self._draws.sample(logits_RV)
                if pace.over(self.fed, ended=not self._eos_ids.isdisjoint(ids)):
                    return
                self._step_rows.advance(self._draws.ids_R)

    def close(self) -> int:
        """Give the requests what was drawn for them; how many tokens that is."""
        for row, start in zip(self.rows, self._starts, strict=True):
            row.cached = start + self.fed
        return self._draws.deliver()

    def _mark(self, logits_RV: Tensor) -> None:
        """Keep the logits of rows that are about to draw the first token of a candidate."""
        chosen = [index for index, row in enumerate(self.rows) if not row.open.ids]
        if chosen:
            self._marks.keep([self.rows[index] for index in chosen], logits_RV[chosen])
