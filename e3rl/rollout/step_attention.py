"""Attention of a decode step: one query token per row over that row's own keys, with heads in groups.

R rows, H query heads, K heads of keys and values (H is a multiple of K), W positions read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

StepAttention = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""From queries [R, H, dim], keys and values [R, K, W, dim], an additive mask [R, W] and the scale to [R, H * dim]."""


def step_attention(device: torch.device) -> StepAttention:
    """The fastest for the device."""
    return _by_products if device.type == "cpu" else _by_kernel


def _by_products(q_RHD: Tensor, keys_RKWD: Tensor, values_RKWD: Tensor, mask_RW: Tensor, scale: float) -> Tensor:
    """Two batched products. PyTorch's CPU kernel goes head by head, which costs more than it saves for one query."""
    rows, kv_heads, width, dim = keys_RKWD.shape
    q_BGD = q_RHD.reshape(rows * kv_heads, -1, dim)  # B: rows by heads of keys; G: query heads that share them
    mask_BGW = mask_RW[:, None, None].expand(-1, kv_heads, q_BGD.shape[1], -1).reshape(len(q_BGD), -1, width)
    scores_BGW = torch.baddbmm(mask_BGW, q_BGD, keys_RKWD.flatten(0, 1).transpose(1, 2), alpha=scale)
    return torch.bmm(scores_BGW.softmax(-1), values_RKWD.flatten(0, 1)).view(rows, -1)


def _by_kernel(q_RHD: Tensor, keys_RKWD: Tensor, values_RKWD: Tensor, mask_RW: Tensor, scale: float) -> Tensor:
    """One fused kernel."""
    seen_RH1D = scaled_dot_product_attention(
        q_RHD.unsqueeze(2), keys_RKWD, values_RKWD, attn_mask=mask_RW[:, None, None], scale=scale, enable_gqa=True
    )
    return seen_RH1D.flatten(1)
