"""A slot cache for any model of the transformers library that attends to keys and values or keeps recurrent states in that
library's `Cache`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from e3rl.engine.torch.storage import SlotStorage, StateName, StepRows, bucketed
from e3rl.engine.torch.threads import Division
from e3rl.models import sliding_window, unwrapped

RECURRENT = ("linear_attention", "conv")
"""Types of layer that keep a state in place of keys and values; those of type hybrid have both."""

_KNOWN = {"full_attention", "sliding_attention", "hybrid", "hybrid_sliding", "moe", "mlp", *RECURRENT}


def unknown_layers(model: Any) -> str:
    """What is said of layers that attend in a way that e3rl doesn't know: in chunks, or to tokens that an indexer picks. '' where
    there are none. A check on few tokens would not see what they leave out."""
    config = unwrapped(model).config.get_text_config(decoder=True)
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN)
    return f"it has layers of type {', '.join(others)}" if others else ""


_Masks = Tensor | dict[str, Tensor | None] | None


class _View(Protocol):
    """Where a forward pass writes new keys (or values), and which ones its queries see; which recurrent states it goes on from,
    and where it leaves the new ones."""

    def write(self, storage: Tensor, states: Tensor) -> Tensor: ...

    def state(self, storage: SlotStorage, name: StateName) -> Tensor | None: ...

    def store(self, storage: SlotStorage, name: StateName, state: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class PromptView:
    """A prompt from position 0 into one slot. Its queries see the prompt alone, so nothing is read back."""

    slot: int

    def write(self, storage: Tensor, states: Tensor) -> Tensor:
        storage[self.slot, :, : states.shape[2]] = states[0]
        return states

    def state(self, storage: SlotStorage, name: StateName) -> None:
        """None: a prompt begins anew."""

    def store(self, storage: SlotStorage, name: StateName, state: Tensor) -> None:
        if name not in storage.states:
            storage.add_state(name, state)
        storage.states[name][self.slot] = state[0]


@dataclass(frozen=True, slots=True)
class DecodeView:
    """One token for each of some slots, at a position of its own; the queries see ``width`` positions of ``read``."""

    read: slice
    slots_R: Tensor
    positions_R: Tensor
    width: int
    taken: dict[StateName, Tensor] = field(default_factory=dict)  # states of the rows, which layers change in place

    def write(self, storage: Tensor, states: Tensor) -> Tensor:
        storage[self.slots_R, :, self.positions_R] = states[:, :, 0]
        return storage[self.read, :, : self.width]

    def state(self, storage: SlotStorage, name: StateName) -> Tensor:
        """A copy: rows that fill up a step must not change the states of those that live where they read."""
        return self.taken.setdefault(name, storage.states[name][self.slots_R])

    def store(self, storage: SlotStorage, name: StateName, state: Tensor) -> None:
        self.taken[name] = state

    def put_back(self, storage: SlotStorage) -> None:
        """Write the states that the step left to the rows' slots."""
        for name, state in self.taken.items():
            storage.states[name][self.slots_R] = state


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, allocated when their shape is first seen."""

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache, self._number = cache, -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Layers that have keys meet their first ones in order, from the first to the last."""
        _, kv_heads, _, key_dim = key_states.shape
        self._number = len(self._cache.storage.keys)
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
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])
        self.storage = storage
        self.view: _View = PromptView(slot=0)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The last inputs of a layer's convolution; None at a prompt's beginning."""
        return self.view.state(self.storage, ("conv", layer_idx, state_idx))

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Keep the last inputs of a convolution; return them with those before, zeros at a prompt's beginning."""
        before, size = self.get_conv_state(layer_idx, state_idx), conv_kernel_size or conv_states.shape[-1]
        if before is None:
            whole = nn.functional.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        else:
            whole = torch.cat([before, conv_states], -1)
        self.view.store(self.storage, ("conv", layer_idx, state_idx), whole[..., -size:])
        return whole

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A layer's recurrent state; None at a prompt's beginning."""
        return self.view.state(self.storage, ("recurrent", layer_idx, state_idx))

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Keep a layer's recurrent state."""
        self.view.store(self.storage, ("recurrent", layer_idx, state_idx), recurrent_states)
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether there are states to go on from."""
        return not isinstance(self.view, PromptView)


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

    def packs(self, length: int) -> bool:
        """No: the model's own pass takes one prompt."""
        return False

    def prefill_together(self, prompts: Sequence[tuple[Sequence[int], int]]) -> list[Tensor]:
        """Run prompts into slots, one after another."""
        return [self.prefill(ids, slot) for ids, slot in prompts]

    def decode(self, rows: StepRows) -> Tensor:
        """Feed each row's token at its position; logits of the tokens after them, [R, V]."""
        width = bucketed(rows.last + 1)
        self._cache.view = view = DecodeView(rows.read, rows.slots_R, rows.positions_R, width)
        positions_R1 = rows.positions_R.unsqueeze(1)
        logits_RV = self._forward(rows.ids_R.unsqueeze(1), positions_R1, self._masks(positions_R1, width))
        view.put_back(self.storage)
        return logits_RV

    def _masks(self, positions_R1: Tensor, width: int) -> _Masks:
        """What each query sees; by type of layer where layers differ. Keys that slid out of a window are kept, for
        rollbacks. Recurrent layers take no mask."""
        if not self.storage.keys:
            return None
        columns_W = self._columns[:width]
        past_RW = columns_W <= positions_R1
        if self._window is None:
            return self._mask(past_RW)
        near = self._mask(past_RW & (columns_W > positions_R1 - self._window))
        if not self._by_layer_type:
            return near
        return {"full_attention": self._mask(past_RW), "sliding_attention": near} | dict.fromkeys(RECURRENT)

    def _mask(self, seen_RW: Tensor) -> Tensor:
        seen_R11W = seen_RW[:, None, None, :]
        if not self._additive_mask:
            return seen_R11W
        zeros_R11W = torch.zeros_like(seen_R11W, dtype=self._dtype)
        return zeros_R11W.masked_fill_(~seen_R11W, torch.finfo(self._dtype).min)

    def _forward(self, ids_RT: Tensor, positions_RT: Tensor, mask: _Masks) -> Tensor:
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
