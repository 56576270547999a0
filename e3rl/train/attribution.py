"""The one attention hook: how much the end of a response attends to each of its tokens, without a T x T matrix.

Registered with the attention registry of transformers, so it serves every model that goes through it. The output is
plain scaled-dot-product attention; beside it, softmax rows are computed for the last L' response positions alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from e3rl.models import unwrapped

ATTENTION_NAME = "e3rl_attribution"


class AttributionTap:
    """Collects eq 19's a_t during one forward pass over right-padded sequences.

    ``prompt_lengths_S`` and ``lengths_S`` (prompt and response) tell where each response lies; ``window`` is L'.
    """

    def __init__(self, prompt_lengths_S: Tensor, lengths_S: Tensor, window: int, layers: frozenset[int]) -> None:
        self._layers = layers
        response_S = lengths_S - prompt_lengths_S
        window_S = response_S.clamp(max=window)
        back_Q = torch.arange(int(window_S.max()), device=lengths_S.device)
        self._query_SQ = (lengths_S[:, None] - 1 - back_Q).clamp(min=0)
        self._real_SQ = back_Q < window_S[:, None]
        self._window_S = window_S
        self._prompt_S, self._length_S = prompt_lengths_S, lengths_S
        self._sum_ST: Tensor | None = None

    def observe(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Add one layer: ``query`` [S, heads, T, d], ``key`` [S, kv heads, T, d], both already rotated."""
        if layer not in self._layers:
            return
        sequences, heads, positions, width = query.shape
        kv_heads = key.shape[1]
        chosen = self._query_SQ[:, None, :, None].expand(-1, heads, -1, width)
        rows = query.detach().gather(2, chosen).view(sequences, kv_heads, heads // kv_heads, -1, width)
        scores = torch.einsum("skgqd,sktd->skgqt", rows.float(), key.detach().float()) * scaling
        key_T = torch.arange(positions, device=key.device)
        visible = key_T <= self._query_SQ[:, :, None]
        weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1).mean((1, 2))
        total_ST = (weights * self._real_SQ[:, :, None]).sum(1) / self._window_S[:, None]
        self._sum_ST = total_ST if self._sum_ST is None else self._sum_ST + total_ST

    def attribution(self) -> Tensor:
        """a_t over all positions [S, T]: mean over queries, heads and layers; 0 outside the response."""
        if self._sum_ST is None:
            raise RuntimeError("no attention layer reported: the model does not use the attention registry")
        position_T = torch.arange(self._sum_ST.shape[1], device=self._sum_ST.device)
        inside_ST = (position_T >= self._prompt_S[:, None]) & (position_T < self._length_S[:, None])
        return self._sum_ST / len(self._layers) * inside_ST


_tap: AttributionTap | None = None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if _tap is not None:
        scaling = kwargs.get("scaling")
        _tap.observe(module.layer_idx, query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)  # type: ignore[arg-type]
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output, None


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def attribution_layers(model: nn.Module, which: str) -> frozenset[int]:
    """D9: the layers averaged over, 'last' or 'all'."""
    count: int = unwrapped(model).config.num_hidden_layers
    return frozenset({count - 1} if which == "last" else range(count))


@contextlib.contextmanager
def tapped(model: nn.Module, tap: AttributionTap) -> Iterator[None]:
    """Run the model's attention through the hook inside the ``with`` block."""
    global _tap
    config = unwrapped(model).config
    before = config._attn_implementation
    _tap = tap
    config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _tap = None
