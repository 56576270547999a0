"""Root-mean-square norms of a forward pass, in as few operations as the device allows.

On a CPU the weights are copied, as `e3rl.engine.torch.projections` copies its own; on a GPU they are used where they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

Norm = Callable[[Tensor], Tensor]
"""Normalises the last dimension."""


def norm(weight_D: Tensor, eps: float) -> Norm:
    """x / sqrt(mean x² + eps) times the weight."""
    return _ByLength(weight_D, eps) if _exact_by_length(weight_D) else _InPlace(weight_D, eps)


def head_norm(query_norm_D: Tensor, key_norm_D: Tensor, heads: int, kv_heads: int, eps: float) -> Norm:
    """Norms of each head of queries and keys side by side, [..., heads + kv_heads, dim]."""
    if _exact_by_length(query_norm_D):
        return _ByLength(_by_head(query_norm_D, key_norm_D, heads, kv_heads), eps)
    return lambda x: rms_norm(x, query_norm_D.shape, None, eps) * _by_head(query_norm_D, key_norm_D, heads, kv_heads)


def _by_head(query_norm_D: Tensor, key_norm_D: Tensor, heads: int, kv_heads: int) -> Tensor:
    return torch.cat([query_norm_D.expand(heads, -1), key_norm_D.expand(kv_heads, -1)])


def _exact_by_length(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)


class _ByLength:
    """x / sqrt(|x|² + dim * eps) times sqrt(dim) * weight: four small operations where `rms_norm` takes seven on a CPU."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        dim = weight.shape[-1]
        self._weight = weight.detach() * dim**0.5
        self._eps = weight.new_full((1,) * max(weight.dim(), 2), dim * eps)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x / torch.addcmul(self._eps, length, length).sqrt_()).mul_(self._weight)


class _InPlace:
    """The weight as it is: no copy."""

    def __init__(self, weight_D: Tensor, eps: float) -> None:
        self._weight_D, self._eps = weight_D, eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self._weight_D.shape, self._weight_D, self._eps)
