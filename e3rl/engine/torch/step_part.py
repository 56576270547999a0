"""Rows in neighbouring slots that are decoded together for a few steps, in one thread (`e3rl.engine.torch.step_parts`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from e3rl.engine.requests import RowState
from e3rl.engine.torch.model import SlotModel
from e3rl.engine.torch.step_draws import StepDraws
from e3rl.engine.torch.step_parts import Pace
from e3rl.engine.torch.storage import StepRows


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


class StepPart:
    """Decodes ``rows``, which lie in the slots from ``first`` on, until its `Pace` says that it is enough."""

    def __init__(
        self, rows: Sequence[SlotRow], first: int, model: SlotModel, marks: Marks, eos_ids: Collection[int], steps: int
    ) -> None:
        self.rows = rows
        self.fed = 0  # tokens of each row run through the model
        self._starts = [row.total - 1 for row in rows]
        self._model, self._marks, self._eos_ids = model, marks, frozenset(eos_ids)
        self._step_rows = StepRows([row.last_id for row in rows], self._starts, model.storage, model.device, first)
        self.spare = self._step_rows.spare
        self._draws = StepDraws([row.open for row in rows], steps, self.spare, model.device)

    def run(self, pace: Pace) -> None:
        """Step until it is enough."""
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
