"""Rollouts by vLLM: rows are lists of ids, and a request submits a row's ids again, naming the row's request before.

Erasing costs no call: the keys and values of the request before are held (`e3rl.engine.vllm.inside`), and the ids that both
have in common say how many of them are used. What runs through the model again is one token, after an erasure as after a
commit. Where memory for holding them is missing, vLLM's prefix cache has every full block that was not used for others.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from torch import Tensor

from e3rl.config import RolloutConfig
from e3rl.engine.protocol import Row, Sampling
from e3rl.engine.requests import RowState, check_prompt, check_siblings, find_row
from e3rl.engine.torch.storage import MIB
from e3rl.engine.vllm.core import Generated, VllmCore
from e3rl.errors import NonFiniteLogits
from e3rl.types import Candidate, Draw
from e3rl.weights.model import copy_weights

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class RunAgain:
    """Requests of rows that had generated before, and the tokens that vLLM ran through the model again for them."""

    requests: int = 0
    tokens: int = 0
    most: int = 0  # for one request

    def add(self, tokens: int) -> None:
        """Count a request."""
        self.requests += 1
        self.tokens += tokens
        self.most = max(self.most, tokens)

    @property
    def mean(self) -> float:
        """Tokens a request."""
        return self.tokens / self.requests if self.requests else 0.0


@dataclass(slots=True)
class VllmStats:
    """What the engine has asked of vLLM. ``prompt`` tokens are those submitted, with all that came before."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of those, held for the row or found in the prefix cache
    sampled_tokens: int = 0
    after_commit: RunAgain = field(default_factory=RunAgain)
    after_erasure: RunAgain = field(default_factory=RunAgain)

    @property
    def hit_rate(self) -> float:
        """Share of the submitted tokens whose keys and values were there already."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(slots=True, eq=False)
class _VllmRow(RowState):
    key: str | None = None  # of the open request
    parked: str = ""  # of the request that ended last: its keys and values are held
    erased: bool = False  # tokens were dropped since then


class VllmEngine:
    """Implements `e3rl.engine.protocol.Engine`. ``core`` may be shared by several engines over the same model."""

    def __init__(
        self,
        model: Any,
        *,
        eos_ids: Sequence[int],
        max_rows: int,
        cache_rows: int,
        max_length: int,
        tensor_parallel_size: int = 1,
        kv_budget: int = 0,
        sleeps: bool = False,
        core: VllmCore | None = None,
    ) -> None:
        self.stats = VllmStats()
        self.policy_version = 0
        self._model, self._eos_ids = model, frozenset(eos_ids)
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        self._cache_rows, self._max_length = cache_rows, max_length
        self._core = core or VllmCore(
            model,
            eos_ids=eos_ids,
            max_rows=max_rows,
            cache_rows=cache_rows,
            max_length=max_length,
            tensor_parallel_size=tensor_parallel_size,
            kv_budget=kv_budget,
            sleeps=sleeps,
        )
        self._sleeps = sleeps
        self._rows: dict[Row, _VllmRow] = {}
        self._handles = count()

    @staticmethod
    def own_settings(rollout: RolloutConfig) -> dict[str, Any]:
        """The settings that this engine has beside those of every engine."""
        return {
            "tensor_parallel_size": rollout.vllm_tensor_parallel_size,
            "kv_budget": rollout.kv_budget * MIB,
            "sleeps": rollout.vllm_sleep,
        }

    def free_rows(self) -> int:
        """How many more rows `prefill` could create now."""
        return self._cache_rows - len(self._rows)

    def prefill(self, prompt_ids: Sequence[int], siblings: int) -> list[Row]:
        """Make the rows; the prompt runs with the first request, and its blocks serve all siblings."""
        check_prompt(prompt_ids, self._vocabulary, self._max_length)
        check_siblings(siblings, self._cache_rows, self.free_rows())
        handles = [Row(next(self._handles)) for _ in range(siblings)]
        self._rows.update((handle, _VllmRow(len(prompt_ids), list(prompt_ids))) for handle in handles)
        return handles

    def length(self, row: Row) -> int:
        """Generated tokens that the row holds, without those of an open request."""
        return find_row(self._rows, row).length

    def extend(self, row: Row, tokens: int, draw: Draw, sampling: Sampling) -> None:
        """Submit the row's ids, with the random numbers of ``draw``."""
        state = find_row(self._rows, row)
        state.open_request(tokens, draw, sampling, self._max_length)
        state.key = self._core.submit(state.ids, state.open, state.parked)

    def append(self, row: Row, ids: Sequence[int]) -> None:
        """Continue the row by tokens that were generated before; they run with the row's next request."""
        find_row(self._rows, row).append(ids, self._vocabulary, self._max_length)

    def poll(self) -> list[tuple[Row, Candidate]]:
        """Let vLLM generate until at least one request is complete, or an interrupt; return all that are complete."""
        asked = {state.key: handle for handle, state in self._rows.items() if state.key is not None}
        generated = self._core.take(asked)
        return [
            (asked[key], self._deliver(self._rows[asked[key]], generated[key])) for key in asked if key in generated
        ]

    def interrupt(self) -> None:
        """Called by any thread: the poll in progress, or else the next one, returns."""
        self._core.interrupt()

    def _deliver(self, row: _VllmRow, generated: Generated) -> Candidate:
        request = row.open
        if not np.isfinite(generated.measures_TM[:, 1]).all():
            raise NonFiniteLogits(request.draw)
        request.ids, request.measures = list(generated.ids), [generated.measures_TM]
        self._count(row, generated)
        row.key, row.parked, row.erased = None, row.key or "", False
        return row.close_request(self._eos_ids)

    def _count(self, row: _VllmRow, generated: Generated) -> None:
        stats, again = self.stats, generated.prompt_tokens - generated.cached_tokens
        stats.requests += 1
        stats.prompt_tokens += generated.prompt_tokens
        stats.cached_tokens += generated.cached_tokens
        stats.sampled_tokens += len(generated.ids)
        if row.parked:
            (stats.after_erasure if row.erased else stats.after_commit).add(again)

    def rollback(self, row: Row, length: int) -> None:
        """Drop generated tokens beyond ``length``: vLLM is told with the row's next request."""
        state = find_row(self._rows, row)
        state.erased |= length < state.length
        state.truncate(length)

    def release(self, row: Row) -> None:
        """Forget the row; an open request is stopped."""
        state = find_row(self._rows, row)
        del self._rows[row]
        self._core.abandon(key for key in (state.key, state.parked) if key)

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Bring new weights into the model and from there into vLLM."""
        if self._rows:
            raise ValueError(
                f"{len(self._rows)} rows are held: their keys belong to the old weights; release them first"
            )
        copy_weights(self._model, weights)
        self._core.reload()
        _log.info(
            "policy %d goes to vLLM; until here %.1f %% of %d submitted tokens were in the prefix cache",
            version,
            100 * self.stats.hit_rate,
            self.stats.prompt_tokens,
        )
        self.policy_version = version

    def rest(self) -> None:
        """Free the device's memory until the next request or new weights, if `rollout.vllm_sleep` is set and no row is held."""
        if self._sleeps and not self._rows:
            self._core.sleep()

    def close(self) -> None:
        """Stop vLLM."""
        self._core.close()
