"""Attention of a decode step: one query token per row over that row's own keys, with heads in groups.

R rows, H query heads, K heads of keys and values (H is a multiple of K), W positions read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries [R, H, dim], keys and values [R, K, W, dim] to [R, H * dim]."""

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
    """One fused kernel."""
    mask_R11W = mask_RW[:, None, None]

    def attend(q_RHD: Tensor, keys_RKWD: Tensor, values_RKWD: Tensor) -> Tensor:
        seen_RH1D = scaled_dot_product_attention(
            q_RHD.unsqueeze(2), keys_RKWD, values_RKWD, attn_mask=mask_R11W, scale=scale, enable_gqa=True
        )
        return seen_RH1D.flatten(1)

    return attend
