"""The forward pass of the Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM2), written out for decoding.

What `e3rl.engine.torch.cache` does for any model, with a fraction of the operations: queries, keys and values in one
product, one rotation, keys written where they stay, attention that reads grouped heads without repeating them. A decode
step reads its input buffers and the cache and nothing else, so that a GPU can record it once and play it back
(`e3rl.engine.torch.recorded`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from e3rl.engine.torch.operations import (
    Norm,
    Projection,
    StepAttention,
    attention,
    fingerprint,
    head_norm,
    norm,
    project,
    step_attention,
)
from e3rl.engine.torch.recorded import CudaGraphs, RecordedSteps, Recorder
from e3rl.engine.torch.storage import SlotStorage, StepRows, bucketed
from e3rl.engine.torch.threads import Division, division, wake_seconds
from e3rl.models import sliding_window

_FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_PACKED = (torch.float32, torch.bfloat16)
"""Types in which a CPU's products of many rows are the same for each row however many there are."""

PACKED_FROM = 16
"""Shortest prompt, in tokens for each thread, that is run beside others: with a few rows a thread, a CPU's matrix kernels round
otherwise than with many (seen up to 6)."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""From a layer's number, queries [R, heads, dim], keys and values [R, kv_heads, dim] to what is read, [R, heads * dim]."""


def of_the_family(model: Any) -> bool:
    """Whether ``model`` is of a class that is written out here, and attends to all of the past."""
    ours = type(model).__name__ in _FAMILY and type(model).__module__.startswith("transformers.models.")
    return ours and sliding_window(model) is None


def fusable(model: Any) -> bool:
    """Whether ``model`` computes what is written out here: the very class, plain linear layers, nothing hooked in."""
    if not of_the_family(model) or model.config._attn_implementation != "sdpa":
        return False
    hooked = any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    at_home = (model.device, model.dtype)
    plain = all(type(p) is nn.Parameter and (p.device, p.dtype) == at_home for p in model.parameters())
    return plain and not hooked and all(type(linear) is nn.Linear for linear in _linear_layers(model))


def _linear_layers(model: Any) -> list[nn.Module]:
    found = [model.lm_head]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        found += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        found += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return found


def decoding_copy_bytes(model: Any) -> int:
    """Bytes of the linear layers' weights, which decoding on a CPU copies (`projections`); 0 for other models."""
    layers = _linear_layers(model) if of_the_family(model) else []
    return sum(p.nbytes for layer in layers for p in layer.parameters())


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Norm
    queries_keys_values: Projection
    head_norm: Norm | None  # of queries and keys (Qwen3)
    output: Projection
    post_norm: Norm
    gate_up: Projection
    activation: nn.Module
    down: Projection

    @classmethod
    def of(cls, layer: Any, heads: int, kv_heads: int, eps: float) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        by_head = None
        if hasattr(attention, "q_norm"):
            by_head = head_norm(attention.q_norm.weight, attention.k_norm.weight, heads, kv_heads, eps)
        return cls(
            norm(layer.input_layernorm.weight, eps),
            project([attention.q_proj, attention.k_proj, attention.v_proj]),
            by_head,
            project([attention.o_proj]),
            norm(layer.post_attention_layernorm.weight, eps),
            project([mlp.gate_proj, mlp.up_proj]),
            mlp.act_fn,
            project([mlp.down_proj]),
        )


class FusedWeights:
    """A model's weights in the layout of the written-out forward pass. All engines of a model share them."""

    _known: ClassVar[weakref.WeakKeyDictionary[nn.Module, FusedWeights]] = weakref.WeakKeyDictionary()

    def __init__(self, model: Any) -> None:
        config, attention = model.config, model.model.layers[0].self_attn
        self._model = weakref.ref(model)
        self.device, self.dtype = model.device, model.dtype
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim, self.scale, self.eps = attention.head_dim, attention.scaling, config.rms_norm_eps
        self.vocabulary = model.lm_head.out_features
        linear = _linear_layers(model)
        self.mean_entries = sum(p.numel() for layer in linear for p in layer.parameters()) // len(linear)
        self.take(model)

    @classmethod
    def of(cls, model: Any) -> FusedWeights:
        """The model's weights as they are now."""
        if model not in cls._known:
            cls._known[model] = cls(model)
        cls._known[model].refresh()
        return cls._known[model]

    @torch.no_grad()
    def take(self, model: Any) -> None:
        """Take the weights again, changed or not."""
        self.embedding_VD = model.model.embed_tokens.weight
        self.layers = [_Layer.of(layer, self.heads, self.kv_heads, self.eps) for layer in model.model.layers]
        self.norm = norm(model.model.norm.weight, self.eps)
        self.head = project([model.lm_head])
        self._fingerprint = fingerprint(model)

    def refresh(self) -> None:
        """Take the model's weights again where they have changed."""
        if fingerprint(self.model) != self._fingerprint:
            self.take(self.model)

    @property
    def model(self) -> Any:
        """The model itself, which whoever made an engine for it holds."""
        model = self._model()
        assert model is not None
        return model

    @torch.no_grad()
    def rotations(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary embedding, [positions, dim]; the sine's sign is that of the half rotated in."""
        cos_1TD, sin_1TD = self.model.model.rotary_emb(
            self.embedding_VD, torch.arange(positions, device=self.device).unsqueeze(0)
        )
        half = self.dim // 2
        return cos_1TD[0], torch.cat([-sin_1TD[0, :, :half], sin_1TD[0, :, half:]], -1)


class FusedSlotModel:
    """`e3rl.engine.torch.model.SlotModel` for a model of the Llama family."""

    def __init__(
        self,
        weights: FusedWeights,
        slots: int,
        max_length: int,
        record: Recorder | None = None,
        attend: StepAttention | None = None,
    ) -> None:
        """``record`` and ``attend`` take the place of what the device has: CUDA graphs, its fastest attention."""
        self._weights = weights
        self.device = weights.device
        self.storage = SlotStorage(slots, bucketed(max_length))
        self._cos_TD, self._sin_TD = weights.rotations(self.storage.capacity)
        self.storage.add_layers(len(weights.layers), weights.kv_heads, weights.dim, weights.dim, self._cos_TD)
        self._columns = torch.arange(self.storage.capacity, device=self.device)
        self._attention = attend or step_attention(self.device)
        self._recorded: RecordedSteps | None = None
        record = record or (CudaGraphs() if self.device.type == "cuda" else None)
        if record is not None:
            shape = (self.storage.scratch + 1, weights.vocabulary)
            logits_SV = torch.empty(shape, device=self.device, dtype=weights.dtype)
            self._recorded = RecordedSteps(self.step, record, self.storage.capacity, logits_SV)

    def refresh(self) -> None:
        """Take the model's weights again where they have changed."""
        self._weights.refresh()

    def take_weights(self) -> None:
        """Take the model's weights again."""
        self._weights.take(self._weights.model)

    def prefill(self, ids: Sequence[int], slot: int) -> Tensor:
        """Run a prompt into a slot; logits of the token after it, [V]."""
        return self.prefill_together([(ids, slot)])[0]

    def packs(self, length: int) -> bool:
        """Whether a prompt of ``length`` tokens has the same bits alone and beside others. GPUs don't promise that."""
        enough = length >= PACKED_FROM * torch.get_num_threads()
        return enough and self.device.type == "cpu" and self._weights.dtype in _PACKED

    def prefill_together(self, prompts: Sequence[tuple[Sequence[int], int]]) -> list[Tensor]:
        """Run prompts into slots, their tokens as rows of the same products; for each the logits of the token after it, [V]."""
        lengths = [len(ids) for ids, _ in prompts]
        ends = list(accumulate(lengths))

        def attend(layer: int, q_TKD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
            keys, values = self.storage.keys[layer], self.storage.values[layer]
            each = zip(*(x_TKD.transpose(0, 1).split(lengths, 1) for x_TKD in (q_TKD, k_TKD, v_TKD)), strict=True)
            seen = []
            for (ids, slot), (q_KTD, k_KTD, v_KTD) in zip(prompts, each, strict=True):
                keys[slot, :, : len(ids)] = k_KTD
                values[slot, :, : len(ids)] = v_KTD
                seen_1KTD = attention(q_KTD[None], k_KTD[None], v_KTD[None], None, self._weights.scale)
                seen.append(seen_1KTD[0].transpose(0, 1).flatten(1))
            return torch.cat(seen)

        ids_T = torch.tensor([token for ids, _ in prompts for token in ids], device=self.device)
        hidden_TD = self._forward(ids_T, torch.cat([self._columns[:length] for length in lengths]), attend)
        return [self._weights.head(hidden_TD[end - 1 : end])[0] for end in ends]

    def division(self, rows: int) -> Division:
        """How a decode step is divided among threads; a GPU has one queue, and there is nothing to divide."""
        threads = torch.get_num_threads()
        if self.device.type != "cpu":
            return Division(1, threads)
        return division(rows, self._weights.mean_entries, threads, wake_seconds(threads))

    def decode(self, rows: StepRows) -> Tensor:
        """Feed each row's token at its position; logits of the tokens after them, [R, V]."""
        width = bucketed(rows.last + 1)
        if self._recorded is not None:
            return self._recorded(rows.ids_R, rows.positions_R, rows.slots_R, width, rows.first)
        attend = self._over_cache(rows.positions_R, rows.slots_R, width, rows.first)
        return self._weights.head(self._forward(rows.ids_R, rows.positions_R, attend))

    def step(self, ids_R: Tensor, positions_R: Tensor, slots_R: Tensor, width: int, first: int = 0) -> Tensor:
        """`decode` of tensors alone, to be recorded: the same operations whatever they hold."""
        return self._weights.head(
            self._forward(ids_R, positions_R, self._over_cache(positions_R, slots_R, width, first))
        )

    def _over_cache(self, positions_R: Tensor, slots_R: Tensor, width: int, first: int) -> Attend:
        """Attention of row i over ``width`` positions of slot ``first`` + i; its own keys are written to ``slots_R[i]``."""
        storage, read = self.storage, slice(first, first + len(positions_R))
        unseen_RW = self._columns[:width] > positions_R.unsqueeze(1)
        mask_RW = torch.zeros_like(unseen_RW, dtype=self._cos_TD.dtype).masked_fill_(unseen_RW, -torch.inf)
        over_keys = self._attention(mask_RW, self._weights.heads, self._weights.kv_heads, self._weights.scale)

        def attend(layer: int, q_RHD: Tensor, k_RKD: Tensor, v_RKD: Tensor) -> Tensor:
            keys, values = storage.keys[layer], storage.values[layer]
            keys[slots_R, :, positions_R] = k_RKD
            values[slots_R, :, positions_R] = v_RKD
            return over_keys(q_RHD, keys[read, :, :width], values[read, :, :width])

        return attend

    def _forward(self, ids_R: Tensor, positions_R: Tensor, attend: Attend) -> Tensor:
        """The last hidden states of R tokens, normalised."""
        weights = self._weights
        cos_R1D, sin_R1D = (table[positions_R].unsqueeze(1) for table in (self._cos_TD, self._sin_TD))
        x_RD = embedding(ids_R, weights.embedding_VD)
        joint, apart = (weights.heads + weights.kv_heads, weights.kv_heads), (weights.heads, weights.kv_heads)
        for number, layer in enumerate(weights.layers):
            qkv_RD = layer.queries_keys_values(layer.input_norm(x_RD))
            qk_RKD, v_RKD = qkv_RD.view(len(qkv_RD), -1, weights.dim).split_with_sizes(joint, 1)
            if layer.head_norm is not None:
                qk_RKD = layer.head_norm(qk_RKD)
            qk_RKD = torch.addcmul(qk_RKD * cos_R1D, qk_RKD.roll(weights.dim // 2, -1), sin_R1D)
            q_RHD, k_RKD = qk_RKD.split_with_sizes(apart, 1)
            x_RD = x_RD + layer.output(attend(number, q_RHD, k_RKD, v_RKD))
            gate_RD, up_RD = layer.gate_up(layer.post_norm(x_RD)).chunk(2, -1)
            x_RD = x_RD + layer.down(layer.activation(gate_RD) * up_RD)
        return weights.norm(x_RD)
