"""The oracle: every token by a full forward pass over one row's ids. No cache and no batch: slow, and simple enough to trust."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from e3rl.engine.protocol import LogitsHook, Row, Sampling
from e3rl.engine.requests import RowState, check_prompt, check_siblings, find_row
from e3rl.engine.sampling import NON_FINITE, SamplingRows, sample
from e3rl.engine.torch.cache import evaluating
from e3rl.errors import NonFiniteLogits
from e3rl.types import Candidate, Draw


class RecomputeEngine:
    """Implements `e3rl.engine.protocol.Engine`. ``max_rows`` has no effect: rows are decoded one at a time."""

    def __init__(
        self, model: Any, *, eos_ids: Sequence[int], cache_rows: int, max_length: int, max_rows: int = 1
    ) -> None:
        self._model, self._eos_ids = model, frozenset(eos_ids)
        self._cache_rows, self._max_length = cache_rows, max_length
        self._rows: dict[Row, RowState] = {}
        self._handles = count()

    def free_rows(self) -> int:
        return self._cache_rows - len(self._rows)

    def prefill(self, prompt_ids: Sequence[int], siblings: int) -> list[Row]:
        check_prompt(prompt_ids, self._model.get_input_embeddings().weight.shape[0], self._max_length)
        check_siblings(siblings, self._cache_rows, self.free_rows())
        handles = [Row(next(self._handles)) for _ in range(siblings)]
        self._rows.update((handle, RowState(len(prompt_ids), list(prompt_ids))) for handle in handles)
        return handles

    def length(self, row: Row) -> int:
        return self._row(row).length

    def extend(self, row: Row, tokens: int, draw: Draw, sampling: Sampling, hook: LogitsHook | None = None) -> None:
        self._row(row).open_request(tokens, draw, sampling, self._max_length, hook)

    def interrupt(self) -> None:
        """Nothing to do: a poll is of one row."""

    @torch.inference_mode()
    def poll(self) -> list[tuple[Row, Candidate]]:
        for handle, row in self._rows.items():
            if row.request is not None:
                with evaluating(self._model):
                    while not row.open.complete(self._eos_ids):
                        self._draw_token(row)
                return [(handle, row.close_request(self._eos_ids))]
        return []

    def _draw_token(self, row: RowState) -> None:
        request = row.open
        device = self._model.device
        ids_1T = torch.tensor([row.ids + request.ids], device=device)
        logits_1V = self._model(input_ids=ids_1T, use_cache=False).logits[:, -1]
        if request.hook is not None:
            request.hook(logits_1V[0], row.ids[row.prompt_length :] + request.ids)
        number_1 = torch.tensor([request.uniforms[len(request.ids)]], device=device)
        samples = sample(logits_1V, SamplingRows.of([request.sampling], device), number_1)
        if samples.ids_S.item() == NON_FINITE:
            raise NonFiniteLogits(request.draw)
        request.ids += samples.ids_S.tolist()
        request.measures += samples.measures()

    def append(self, row: Row, ids: Sequence[int]) -> None:
        self._row(row).append(ids, self._model.get_input_embeddings().weight.shape[0], self._max_length)

    def rollback(self, row: Row, length: int) -> None:
        self._row(row).truncate(length)

    def release(self, row: Row) -> None:
        self._row(row)
        del self._rows[row]

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        if self._rows:
            raise ValueError(f"{len(self._rows)} rows are held: release them first")
        self._model.load_state_dict(weights, strict=False)

    def _row(self, row: Row) -> RowState:
        return find_row(self._rows, row)
