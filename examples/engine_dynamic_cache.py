"""A complete engine from outside the package: a `DynamicCache`, as `model.generate` uses it, for every row.

Train with it:   e3rl train RECIPE rollout.engine=examples/engine_dynamic_cache.py:DynamicCacheEngine
Check it:        pytest tests/examples      (runs the contract suite of `e3rl.testing.engine` against the slow oracle)
An engine is what knows about KV caches; the driver only says which tokens to drop. This one decodes a row at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from transformers import DynamicCache

from e3rl.engine.protocol import Row, Sampling
from e3rl.engine.requests import RowState, check_prompt, check_siblings, find_row
from e3rl.engine.sampling import NON_FINITE, SamplingRows, sample
from e3rl.engine.torch.cache import cache_argument, evaluating
from e3rl.errors import NonFiniteLogits
from e3rl.types import Candidate, Draw


class DynamicCacheEngine:
    def __init__(self, model: Any, *, eos_ids: Sequence[int], max_rows: int, cache_rows: int, max_length: int) -> None:
        self._model, self._eos_ids, self._capacity, self._longest = model, frozenset(eos_ids), cache_rows, max_length
        self._rows: dict[Row, tuple[RowState, Any]] = {}
        self._handles = count()

    def free_rows(self) -> int:
        return self._capacity - len(self._rows)

    def prefill(self, prompt_ids: Sequence[int], siblings: int) -> list[Row]:
        check_prompt(prompt_ids, self._model.get_input_embeddings().weight.shape[0], self._longest)
        check_siblings(siblings, self._capacity, self.free_rows())
        self._next_logits(list(prompt_ids), cache := DynamicCache())
        handles = [Row(next(self._handles)) for _ in range(siblings)]
        self._rows |= {h: (RowState(len(prompt_ids), list(prompt_ids)), copy.deepcopy(cache)) for h in handles}
        return handles

    def length(self, row: Row) -> int:
        return find_row(self._rows, row)[0].length

    def extend(self, row: Row, tokens: int, draw: Draw, sampling: Sampling) -> None:
        find_row(self._rows, row)[0].open_request(tokens, draw, sampling, self._longest)

    def poll(self) -> list[tuple[Row, Candidate]]:
        for handle, (row, cache) in self._rows.items():
            if request := row.request:
                settings = SamplingRows.of([request.sampling], self._model.device)
                while not request.complete(self._eos_ids):
                    number = torch.tensor([request.uniforms[len(request.ids)]], device=self._model.device)
                    drawn = sample(self._next_logits(row.ids + request.ids, cache), settings, number)
                    if drawn.ids_S.item() == NON_FINITE:
                        raise NonFiniteLogits(request.draw)
                    request.ids += drawn.ids_S.tolist()
                    request.measures += drawn.measures()
                return [(handle, row.close_request(self._eos_ids))]
        return []

    @torch.inference_mode()
    def _next_logits(self, ids: list[int], cache: Any) -> torch.Tensor:
        cache.crop(min(0, len(ids) - 1 - cache.get_seq_length()))  # what was rolled back; the last token is fed again
        new_1T = torch.tensor([ids[cache.get_seq_length() :]], device=self._model.device)
        with evaluating(self._model):
            return self._model(input_ids=new_1T, use_cache=True, **{cache_argument(self._model): cache}).logits[:, -1]

    def rollback(self, row: Row, length: int) -> None:
        find_row(self._rows, row)[0].truncate(length)

    def release(self, row: Row) -> None:
        find_row(self._rows, row)
        del self._rows[row]

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        if self._rows:
            raise ValueError(f"{len(self._rows)} rows are held: release them first")
        self._model.load_state_dict(weights, strict=False)
