"""Causal backtracking attribution: paper §3.3 (eq 19). S responses, G siblings, H heads, Q queries (the last L'), K keys."""

from __future__ import annotations

import torch
from torch import Tensor


def token_attribution(scores_SHQK: Tensor, weights_SQ: Tensor) -> Tensor:
    """Eq 19. a_t of one layer, [S, K]: attention paid to token t, a mean over heads and the last L' response tokens.

    ``scores_SHQK``: attention logits, -inf where a query does not attend. ``weights_SQ``: 1 / L', 0 for missing queries.
    """
    responses, heads, _, keys = scores_SHQK.shape
    weights_SQ = (weights_SQ / heads).repeat(1, heads)
    return (weights_SQ[:, None] @ scores_SHQK.softmax(-1).view(responses, -1, keys))[:, 0]


def attention_shares(attribution_ST: Tensor, mask_ST: Tensor) -> Tensor:
    """Eq 19. a_t / Z over the response's real tokens: sums to 1, and is 0 elsewhere. Z may be summed over layers.

    The smallest normal number is added to every token: it changes no share, and shares are equal where attention is all 0.
    """
    weights_ST = (attribution_ST + torch.finfo(attribution_ST.dtype).tiny).where(mask_ST, 0.0)
    return weights_ST / weights_ST.sum(-1, keepdim=True)


def segment_rewards(rewards_G: Tensor, shares_GN: Tensor) -> Tensor:
    """Eq 19. R_n, [G, N]: the sequence reward, divided among the segments by their shares."""
    return rewards_G[:, None] * shares_GN
