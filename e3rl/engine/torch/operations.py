"""What the written-out forward pass (`e3rl.engine.torch.fused`) is made of: norms, products, attention of one query a row.

Each in as few operations as the device allows. On a CPU the weights are copied: several linear layers that share an input are
stacked, and large ones laid out for oneDNN, whose kernels are faster for few rows than those behind
`torch.nn.functional.linear`. On a GPU they are used where they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from e3rl.models import unwrapped

Norm = Callable[[Tensor], Tensor]
"""Normalises the last dimension."""


def norm(weight_D: Tensor, eps: float) -> Norm:
    """x / sqrt(mean x² + eps) times the weight."""
    return _NormByLength(weight_D, eps) if _exact_by_length(weight_D) else _NormInPlace(weight_D, eps)


def head_norm(query_norm_D: Tensor, key_norm_D: Tensor, heads: int, kv_heads: int, eps: float) -> Norm:
    """Norms of each head of queries and keys side by side, [..., heads + kv_heads, dim]."""
    if _exact_by_length(query_norm_D):
        return _NormByLength(_by_head(query_norm_D, key_norm_D, heads, kv_heads), eps)
    return lambda x: rms_norm(x, query_norm_D.shape, None, eps) * _by_head(query_norm_D, key_norm_D, heads, kv_heads)


def _by_head(query_norm_D: Tensor, key_norm_D: Tensor, heads: int, kv_heads: int) -> Tensor:
    return torch.cat([query_norm_D.expand(heads, -1), key_norm_D.expand(kv_heads, -1)])


def _exact_by_length(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)


class _NormByLength:
    """x / sqrt(|x|² + dim * eps) times sqrt(dim) * weight: four small operations where `rms_norm` takes seven on a CPU."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        dim = weight.shape[-1]
        self._weight = weight.detach() * dim**0.5
        self._eps = weight.new_full((1,) * max(weight.dim(), 2), dim * eps)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x / torch.addcmul(self._eps, length, length).sqrt_()).mul_(self._weight)


class _NormInPlace:
    """The weight itself, without a copy."""

    def __init__(self, weight_D: Tensor, eps: float) -> None:
        self._weight_D, self._eps = weight_D, eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self._weight_D.shape, self._weight_D, self._eps)


Projection = Callable[[Tensor], Tensor]
"""From the layers' common input to their outputs side by side."""


_LARGE = 2**17
"""Entries of a weight from which oneDNN's kernels save more than the 12 microseconds that a call of them costs."""


def project(layers: Sequence[nn.Linear]) -> Projection:
    """The layers' outputs, concatenated."""
    weight = layers[0].weight
    if weight.device.type != "cpu":
        return _ProjectionInPlace(layers)
    large = sum(layer.weight.numel() for layer in layers) >= _LARGE
    packs = large and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return _Packed(layers) if packs else _Stacked(layers)


def _stacked(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    return torch.cat([layer.weight.detach() for layer in layers]), torch.cat(biases) if biases else None


class _Stacked:
    """A stacked copy of the weights. Later writes to the layers are not seen."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._weight, self._bias = _stacked(layers)

    def __call__(self, x_RD: Tensor) -> Tensor:
        return nn.functional.linear(x_RD, self._weight, self._bias)


class _Packed:
    """As `_Stacked`, in oneDNN's own layout."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weight, self._bias = _stacked(layers)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)

    def __call__(self, x_RD: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_RD, self._weight, self._bias, "none", [], "")
        return product


class _ProjectionInPlace:
    """The layers themselves, without a copy."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers = layers

    def __call__(self, x_RD: Tensor) -> Tensor:
        return torch.cat([nn.functional.linear(x_RD, layer.weight, layer.bias) for layer in self._layers], -1)


def fingerprint(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """The parameters' addresses and version counters: changes when the weights do.

    Writes through ``parameter.data`` are not counted: after such, say so by `Engine.load_weights`.
    """
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of a decode step: one query token a row over that row's own keys, with heads in groups. R rows, H query heads, K heads of keys
and values (H is a multiple of K), W positions read.

From queries [R, H, dim], keys and values [R, K, W, dim] to [R, H * dim]."""

StepAttention = Callable[[Tensor, int, int, float], Attention]
"""From an additive mask [R, W], H, K and the scale to what each layer does."""


def step_attention(device: torch.device) -> StepAttention:
    """The fastest for the device."""
    return _by_products if device.type == "cpu" else _by_kernel


def _by_products(mask_RW: Tensor, heads: int, kv_heads: int, scale: float) -> Attention:
    """Two batched products. PyTorch's CPU kernel goes head by head, which costs more than it saves for one query."""
    shared = heads // kv_heads
    mask_BGW = mask_RW[:, None, None].expand(-1, kv_heads, shared, -1).flatten(0, 1)  # B: rows by heads of keys

    def attend(q_RHD: Tensor, keys_RKWD: Tensor, values_RKWD: Tensor) -> Tensor:
        rows, _, dim = q_RHD.shape
        q_BGD = q_RHD.reshape(rows * kv_heads, shared, dim)  # G: query heads that share keys
        scores_BGW = torch.baddbmm(mask_BGW, q_BGD, keys_RKWD.flatten(0, 1).transpose(1, 2), alpha=scale)
        return torch.bmm(scores_BGW.softmax(-1), values_RKWD.flatten(0, 1)).view(rows, -1)

    return attend


def _by_kernel(mask_RW: Tensor, heads: int, kv_heads: int, scale: float) -> Attention:
    """One fused kernel, for which query heads that share keys are queries at the same place."""
    mask_R11W = mask_RW[:, None, None]

    def attend(q_RHD: Tensor, keys_RKWD: Tensor, values_RKWD: Tensor) -> Tensor:
        rows, _, dim = q_RHD.shape
        q_RKGD = q_RHD.view(rows, kv_heads, heads // kv_heads, dim)
        return scaled_dot_product_attention(q_RKGD, keys_RKWD, values_RKWD, attn_mask=mask_R11W, scale=scale).flatten(1)

    return attend


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """Attention of queries [1, H, Q, dim] to keys and values [1, K, W, dim]; without a mask each query sees all keys up to its
    place, the last query all of them.

    On a GPU flash attention alone takes heads in groups, and neither a mask nor float32: for those keys and values are repeated,
    so that the memory-efficient kernel runs and not the one that holds a matrix of scores.
    """
    queries, keys, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    flash = mask is None and query.dtype != torch.float32
    if groups > 1 and not flash and query.device.type != "cpu":
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        groups = 1
    if mask is None and queries < keys:
        mask = causal_lower_right(queries, keys)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=groups > 1
    )


MASKED = 2**20
"""Entries up to which a CPU's kernel, which knows no other place for the first query than the beginning, is given a mask."""
_BLOCK = 512
"""Queries of a layer with a window that are looked at together."""


@functools.lru_cache(maxsize=64)  # layers and neighbouring branches ask for the same
@torch.inference_mode(False)
def _mask(queries: int, keys: int, before: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 where a query sees a key, -inf where it doesn't; the first query is at place ``before`` of the keys."""
    back_QK = torch.arange(before, before + queries, device=device)[:, None] - torch.arange(keys, device=device)
    unseen_QK = back_QK < 0 if window is None else (back_QK < 0) | (back_QK >= window)
    return torch.zeros(unseen_QK.shape, dtype=dtype, device=device).masked_fill_(unseen_QK, -torch.inf)


def attention_behind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None = None,
    sink: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of a sequence's last places to all of it: each sees itself and what is before it, at most ``window`` places, and
    always the first key where that is a ``sink``.

    What it takes grows with the places, not with queries times keys: no mask is larger than `MASKED` or a block of a window.
    """
    queries, keys = query.shape[2], key.shape[2]
    before = keys - queries
    if window is not None and keys - sink > window:
        return _in_window(query, key, value, window, sink, scale, dropout)
    if before == 0 or query.device.type != "cpu":
        return attention(query, key, value, None, scale, dropout)
    if queries * keys <= MASKED:
        mask = _mask(queries, keys, before, None, query.dtype, query.device)
        return attention(query, key, value, mask, scale, dropout)
    whole = nn.functional.pad(query, (0, 0, before, 0))  # queries for the places before, whose results are dropped
    return attention(whole, key, value, None, scale, dropout)[:, :, before:]


def _in_window(
    query: Tensor, key: Tensor, value: Tensor, window: int, sink: bool, scale: float | None, dropout: float
) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    outputs = []
    for start in range(0, queries, _BLOCK):
        end = min(start + _BLOCK, queries)
        place, last = keys - queries + start, keys - queries + end
        first = max(int(sink), place - window + 1)
        mask = _mask(end - start, last - first, place - first, window, query.dtype, query.device)
        seen_key, seen_value = key[:, :, first:last], value[:, :, first:last]
        if sink:
            seen_key, seen_value = (
                torch.cat([x[:, :, :1], seen], 2) for x, seen in ((key, seen_key), (value, seen_value))
            )
            mask = nn.functional.pad(mask, (1, 0))
        outputs.append(attention(query[:, :, start:end], seen_key, seen_value, mask, scale, dropout))
    return torch.cat(outputs, 2)


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its output matrix's product: ``cap * tanh(scale * x / cap)``, or the scale alone."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of_model(cls, model: Any) -> LogitTransform:
        """As the model's config says; `e3rl.train.scoring.require_scorable` compares the result."""
        config = unwrapped(model).config.get_text_config(decoder=True)
        scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        return cls(scale / divisor, getattr(config, "final_logit_softcapping", None))

    def of(self, products: Tensor) -> Tensor:
        """Logits, in the products' place."""
        scaled = products if self.scale == 1 else products.mul_(self.scale)
        return scaled if self.cap is None else scaled.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d products."""
        return self.scale if self.cap is None else (logits / self.cap).square_().neg_().add_(1).mul_(self.scale)


PLAIN_LOGITS = LogitTransform()
