"""Causal backtracking attribution: paper §3.3 (eq 19). Leading dimensions before T are batch dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from e3rl.equations._number import Number, as_tensor
from e3rl.equations.policy import segment_sums


def token_attribution(attention_QT: Tensor) -> Tensor:
    """Eq 19. a_t: attention paid to token t, averaged over the rows of the last L' response tokens (Q = L')."""
    return attention_QT.mean(-2)


def attention_shares(attribution_T: Tensor, mask_T: Tensor) -> Tensor:
    """Eq 19. a_t / Z over the response's real tokens: sums to 1, and is 0 elsewhere.

    The smallest normal number on every token changes no share, and makes shares equal where no token has any attention.
    """
    weights_T = (attribution_T + torch.finfo(attribution_T.dtype).tiny).where(mask_T, 0.0)
    return weights_T / weights_T.sum(-1, keepdim=True)


def segment_rewards(reward: Number, attribution_T: Tensor, segments_T: Tensor, num_segments: int) -> Tensor:
    """Eq 19. R_n: the sequence reward, divided among the segments by attention; they add up to the reward."""
    shares_T = attention_shares(attribution_T, segments_T >= 0)
    return as_tensor(reward).unsqueeze(-1) * segment_sums(shares_T, segments_T, num_segments)
