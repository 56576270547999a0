"""A KV cache whose rows have lengths of their own, for any full-attention model of the transformers library.

Keys and values of a layer are one tensor ``[slots, kv_heads, capacity, head_dim]``. What lies behind a row's length is
stale and masked out, so that rolling a row back is nothing but forgetting a number. The cache does not know the
lengths: whoever uses it says where to write and how far to read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

PACK = 4
"""Rows of a decode step come in multiples of this: with one to three rows the CPU's matrix kernels round otherwise than
with more, and a row's numbers must be the same, to the last bit, whatever else is decoded."""


def packed(rows: int) -> int:
    """``rows`` rounded up to a multiple of `PACK`."""
    return -(-rows // PACK) * PACK


class _View(Protocol):
    """Where a forward pass writes new keys (or values), and which ones its queries see."""

    def write(self, storage: Tensor, states: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class PromptView:
    """A prompt from position 0 into one slot. Its queries see the prompt alone, so nothing is read back."""

    slot: int

    def write(self, storage: Tensor, states: Tensor) -> Tensor:
        storage[self.slot, :, : states.shape[2]] = states[0]
        return states


@dataclass(frozen=True, slots=True)
class DecodeView:
    """One token for each of the first slots, at a position of its own; queries see the first ``width`` positions.

    What fills a step up to a multiple of `PACK` is behind the rows: it reads whatever is there and writes nothing.
    """

    rows_S: Tensor
    positions_S: Tensor
    width: int

    def write(self, storage: Tensor, states: Tensor) -> Tensor:
        storage[self.rows_S, :, self.positions_S] = states[: len(self.rows_S), :, 0]
        return storage[: len(states), :, : self.width]


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, allocated when their shape is first seen."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate both tensors for all slots. Zeros: what is masked out must still be finite."""
        slots, capacity = packed(self._cache.slots), self._cache.capacity
        self.keys, self.values = (
            states.new_zeros((slots, states.shape[1], capacity, states.shape[3]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return those that the queries see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        view = self._cache.view
        return view.write(self.keys, key_states), view.write(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Only asked for prompts, which see themselves; decoding brings its own mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """What the model takes for the start of new tokens: only asked for prompts."""
        return 0

    def get_max_length(self) -> int:
        """Positions of a slot."""
        return self._cache.capacity


class SlotCache(Cache):
    """``slots`` rows of up to ``capacity`` positions in each of ``layers`` layers."""

    def __init__(self, layers: int, slots: int, capacity: int) -> None:
        self._slot_layers = [SlotLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self._slot_layers))
        self.slots = slots
        self.capacity = capacity
        self.view: _View = PromptView(slot=0)

    @property
    def bytes(self) -> int:
        """Memory of all keys and values, used or not. It never changes after the first forward pass."""
        return sum(storage.nbytes for storage in self._storages())

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """The first ``length`` positions of one slot, copied to others."""
        for storage in self._storages():
            for target in targets:
                storage[target, :, :length] = storage[source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first ``length`` positions of two slots."""
        for storage in self._storages():
            kept = storage[one, :, :length].clone()
            storage[one, :, :length] = storage[other, :, :length]
            storage[other, :, :length] = kept

    def scrub(self, slot: int) -> None:
        """Zero a slot that may hold NaN, which a mask does not stop (0 * NaN)."""
        for storage in self._storages():
            storage[slot].zero_()

    def _storages(self) -> Iterator[Tensor]:
        for layer in self._slot_layers:
            if layer.is_initialized:
                yield layer.keys
                yield layer.values


def _unwrapped(model: Any) -> Any:
    """The transformers model itself: PEFT adapters such as LoRA live inside its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class SlotModel:
    """A model and its slot cache: runs prompts and decode steps, and returns next-token logits."""

    def __init__(self, model: Any, slots: int, max_length: int, bucket: int = 32) -> None:
        self._model = _unwrapped(model)
        self._bucket = bucket
        config = self._model.config.get_text_config(decoder=True)
        self.cache = SlotCache(config.num_hidden_layers, slots, -(-max_length // bucket) * bucket)
        self.device = self._model.device
        self.dtype = self._model.dtype
        self._additive_mask = config._attn_implementation == "eager"  # eager attention adds its mask to the scores
        self._columns = torch.arange(self.cache.capacity, device=self.device)
        self._slots = torch.arange(slots, device=self.device)

    def prefill(self, ids: Sequence[int], slot: int) -> Tensor:
        """Run a prompt into a slot; logits of the token after it, [V]."""
        self.cache.view = PromptView(slot)
        ids_1T = torch.tensor([ids], device=self.device)
        positions_1T = self._columns[: len(ids)].unsqueeze(0)
        return self._forward(ids_1T, positions_1T, None)[0]

    def decode(self, ids_S: Tensor, positions_S: Tensor, last: int) -> Tensor:
        """Feed one token to each of the first S slots at its position; logits of the tokens after them, [S, V].

        ``last`` is the largest of the positions, known without asking the device.
        """
        width = min((last // self._bucket + 1) * self._bucket, self.cache.capacity)
        size = len(ids_S)
        self.cache.view = DecodeView(self._slots[:size], positions_S, width)
        ids_S, positions_S = (torch.nn.functional.pad(x_S, (0, packed(size) - size)) for x_S in (ids_S, positions_S))
        positions_S1 = positions_S.unsqueeze(1)
        mask_S11W = (self._columns[:width] <= positions_S1)[:, None, None, :]
        if self._additive_mask:
            mask_S11W = torch.zeros_like(mask_S11W, dtype=self.dtype).masked_fill_(
                ~mask_S11W, torch.finfo(self.dtype).min
            )
        return self._forward(ids_S.unsqueeze(1), positions_S1, mask_S11W)[:size]

    def _forward(self, ids_ST: Tensor, positions_ST: Tensor, mask: Tensor | None) -> Tensor:
        output = self._model(
            input_ids=ids_ST,
            attention_mask=mask,
            position_ids=positions_ST,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]
