"""Attention over a packed row, and how much the end of a response attends to each of its tokens.

Registered with the attention registry of transformers, so it serves every model that goes through it. Each branch of
the row attends to its context and causally to itself, in plain scaled-dot-product attention; beside it, softmax rows
are computed for the last L' response positions of each trajectory alone: no T x T matrix exists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from e3rl.equations.attribution import attention_shares
from e3rl.models import unwrapped
from e3rl.train.packing import Branch, PackedRow

ATTENTION_NAME = "e3rl_packed"


class AttributionTap:
    """Collects eq 19's a_t of a row's trajectories during one forward pass. ``window`` is L'."""

    def __init__(self, row: PackedRow, window: int, layers: frozenset[int]) -> None:
        self._row, self._window, self._layers = row, window, layers
        self._sums: dict[int, Tensor] = {}

    @torch.no_grad()
    def observe(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Add one layer: ``query`` [1, heads, N, d], ``key`` [1, kv heads, N, d], both already rotated."""
        if layer not in self._layers:
            return
        kv_heads, width = key.shape[1], query.shape[-1]
        for index, (path_L, prompt) in enumerate(zip(self._row.paths, self._row.prompt_lengths, strict=True)):
            if self._row.erased[index]:
                continue
            length = len(path_L)
            size = min(self._window, length - prompt)
            rows = query[0].index_select(1, path_L[-size:]).view(kv_heads, -1, size, width)
            keys = key[0].index_select(1, path_L)[:, None]
            scores = (rows.float() @ keys.float().transpose(-1, -2)) * scaling
            query_Q1 = torch.arange(length - size, length, device=key.device)[:, None]
            scores.masked_fill_(torch.arange(length, device=key.device) > query_Q1, float("-inf"))
            total_T = scores.softmax(-1).mean((0, 1, 2))[prompt:]
            self._sums[index] = self._sums[index] + total_T if index in self._sums else total_T

    def attribution(self) -> list[Tensor | None]:
        """a_t of every response token, a mean over queries, heads and layers; None for erased candidates."""
        return [self._sums[i] / len(self._layers) if i in self._sums else None for i in range(len(self._row.paths))]

    def shares(self) -> list[Tensor | None]:
        """a_t of each trajectory, made to add up to 1."""
        return [None if a_T is None else attention_shares(a_T, torch.ones_like(a_T) > 0) for a_T in self.attribution()]


def _mask(branch: Branch, before: int, window: int | None, device: torch.device) -> Any:
    """Which of ``before`` context tokens and its own a branch's tokens see."""
    if window is None or before + branch.size <= window:
        return causal_lower_right(branch.size, before + branch.size)
    query_Q1 = torch.arange(before, before + branch.size, device=device)[:, None]
    key_K = torch.arange(before + branch.size, device=device)
    return (key_K <= query_Q1) & (key_K > query_Q1 - window)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_row: PackedRow,
    attribution_tap: AttributionTap | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of every branch. Split, not indexed: its gradient is a concatenation."""
    if attribution_tap is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        attribution_tap.observe(module.layer_idx, query, key, scale)  # type: ignore[arg-type]
    branches = packed_row.branches
    sizes = [branch.size for branch in branches]
    queries, keys, values = (states.split(sizes, 2) for states in (query, key, value))
    outputs = []
    for index, branch in enumerate(branches):
        seen_keys, seen_values = (
            torch.cat([*(states[b][:, :, start:end] for b, start, end in branch.context), states[index]], 2)
            if branch.context
            else states[index]
            for states in (keys, values)
        )
        before = seen_keys.shape[2] - branch.size
        outputs.append(
            scaled_dot_product_attention(
                queries[index],
                seen_keys,
                seen_values,
                attn_mask=_mask(branch, before, sliding_window, query.device),
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Branches bring their own."""


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def attribution_layers(model: nn.Module, which: str) -> frozenset[int]:
    """D9: the layers averaged over, 'last' or 'all'."""
    count: int = unwrapped(model).config.num_hidden_layers
    return frozenset({count - 1} if which == "last" else range(count))


@contextlib.contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block the model takes packed rows; backward passes that recompute belong inside as well."""
    config = unwrapped(model).config
    before = config._attn_implementation
    config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        config._attn_implementation = before
