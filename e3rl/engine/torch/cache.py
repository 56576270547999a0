"""A slot cache for any model of the transformers library that attends to keys and values, as that library's `Cache`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from e3rl.engine.torch.storage import SlotStorage, StepRows, bucketed
from e3rl.engine.torch.threads import Division
from e3rl.models import sliding_window, unwrapped


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
    """One token for each of some slots, at a position of its own; the queries see ``width`` positions of ``read``."""

    read: slice
    slots_R: Tensor
    positions_R: Tensor
    width: int

    def write(self, storage: Tensor, states: Tensor) -> Tensor:
        storage[self.slots_R, :, self.positions_R] = states[:, :, 0]
        return storage[self.read, :, : self.width]


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, allocated when their shape is first seen."""

    is_sliding = False

    def __init__(self, cache: SlotCache, number: int) -> None:
        super().__init__()
        self._cache, self._number = cache, number

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Layers meet their first keys in order, from the first to the last."""
        _, kv_heads, _, key_dim = key_states.shape
        self._cache.storage.add_layers(1, kv_heads, key_dim, value_states.shape[3], key_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return those that the queries see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        storage, view = self._cache.storage, self._cache.view
        return view.write(storage.keys[self._number], key_states), view.write(
            storage.values[self._number], value_states
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Only asked for prompts, which see themselves; decoding brings its own mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """What the model takes for the start of new tokens: only asked for prompts."""
        return 0

    def get_max_length(self) -> int:
        """Positions of a slot."""
        return self._cache.storage.capacity


class SlotCache(Cache):
    """A `SlotStorage` that the layers of a transformers model write to and read from."""

    def __init__(self, layers: int, storage: SlotStorage) -> None:
        super().__init__(layers=[SlotLayer(self, number) for number in range(layers)])
        self.storage = storage
        self.view: _View = PromptView(slot=0)


def cache_argument(model: Any) -> str:
    """Name of the forward pass's cache argument, which differs between versions of the library and custom models."""
    return "cache" if "cache" in inspect.signature(unwrapped(model).forward).parameters else "past_key_values"


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Inside the ``with`` block dropout is off; afterwards every module's training flag is restored."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class GenericSlotModel:
    """A model's own forward pass over a slot cache: `e3rl.engine.torch.model.SlotModel` for any architecture."""

    def __init__(self, model: Any, slots: int, max_length: int) -> None:
        self._model = unwrapped(model)
        config = self._model.config.get_text_config(decoder=True)
        self.storage = SlotStorage(slots, bucketed(max_length))
        self.device = self._model.device
        self._dtype = self._model.dtype
        self._cache = SlotCache(config.num_hidden_layers, self.storage)
        self._given_cache = {cache_argument(model): self._cache}
        self._additive_mask = config._attn_implementation == "eager"  # eager attention adds the mask to the scores
        self._columns = torch.arange(self.storage.capacity, device=self.device)
        self._window, self._by_layer_type = sliding_window(model), getattr(config, "layer_types", None) is not None

    def refresh(self) -> None:
        """The model's own weights are used where they are."""

    def take_weights(self) -> None:
        """As `refresh`."""

    def division(self, rows: int) -> Division:
        """One part: the model writes to one view of the cache at a time."""
        return Division(1, torch.get_num_threads())

    def prefill(self, ids: Sequence[int], slot: int) -> Tensor:
        """Run a prompt into a slot; logits of the token after it, [V]."""
        self._cache.view = PromptView(slot)
        ids_1T = torch.tensor([ids], device=self.device)
        return self._forward(ids_1T, self._columns[: len(ids)].unsqueeze(0), None)[0]

    def decode(self, rows: StepRows) -> Tensor:
        """Feed each row's token at its position; logits of the tokens after them, [R, V]."""
        width = bucketed(rows.last + 1)
        self._cache.view = DecodeView(rows.read, rows.slots_R, rows.positions_R, width)
        positions_R1 = rows.positions_R.unsqueeze(1)
        return self._forward(rows.ids_R.unsqueeze(1), positions_R1, self._masks(positions_R1, width))

    def _masks(self, positions_R1: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """What each query sees; by type of layer where layers differ. Keys that slid out of a window are kept, for
        rollbacks."""
        columns_W = self._columns[:width]
        past_RW = columns_W <= positions_R1
        if self._window is None:
            return self._mask(past_RW)
        near = self._mask(past_RW & (columns_W > positions_R1 - self._window))
        return {"full_attention": self._mask(past_RW), "sliding_attention": near} if self._by_layer_type else near

    def _mask(self, seen_RW: Tensor) -> Tensor:
        seen_R11W = seen_RW[:, None, None, :]
        if not self._additive_mask:
            return seen_R11W
        zeros_R11W = torch.zeros_like(seen_R11W, dtype=self._dtype)
        return zeros_R11W.masked_fill_(~seen_R11W, torch.finfo(self._dtype).min)

    def _forward(self, ids_RT: Tensor, positions_RT: Tensor, mask: Tensor | dict[str, Tensor] | None) -> Tensor:
        with evaluating(self._model):
            output = self._model(
                input_ids=ids_RT,
                attention_mask=mask,
                position_ids=positions_RT,
                use_cache=True,
                logits_to_keep=1,
                **self._given_cache,
            )
        return output.logits[:, -1]
