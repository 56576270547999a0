"""Group-normalised advantages: paper §3.3 (eq 20), and the sequence-level ones of its ablations."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_advantages(rewards_GN: Tensor, eps: float) -> Tensor:
    """Eq 20. A_n^i, normalised over all G siblings with population statistics.

    A sibling without segment n counts with R_n = 0, so ``rewards_GN`` holds 0 there.
    """
    centred_GN = rewards_GN - rewards_GN.mean(0)
    return centred_GN / (rewards_GN.std(0, correction=0) + eps)


def sequence_advantages(rewards_G: Tensor, eps: float) -> Tensor:
    """Eq 20. The same normalisation of whole-sequence rewards (`allocation` = 'sequence')."""
    return (rewards_G - rewards_G.mean()) / (rewards_G.std(correction=0) + eps)


def is_degenerate(rewards_G: Tensor) -> Tensor:
    """Eq 20. True where all sequence rewards are equal: eq 20 would only amplify attention noise."""
    return (rewards_G == rewards_G[0]).all()


def anchored_advantages(sequence_advantages_G: Tensor, shares_GN: Tensor, segment_counts_G: Tensor) -> Tensor:
    """Eq 19-20. `allocation` = 'anchored': A_i N_i share_n: the sign is A_i's, and the mean over the segments is A_i."""
    return (sequence_advantages_G * segment_counts_G).unsqueeze(-1) * shares_GN


def value_advantages(rewards_G: Tensor, uncertainties_GN: Tensor, exists_GN: Tensor, eps: float) -> Tensor:
    """Eq 20 (ours). `allocation` = 'value': a segment's advantage is what it changes in the value V of its response, times N_i.

    V is the group's mean reward before the first segment (rewards are scaled to [0, 1]) and the reward after the last; between
    them the mean's log odds less U against the siblings' mean U. So the mean over segments is the sequence advantage.
    """
    low, high = rewards_G.min(), rewards_G.max()
    scaled_G = (rewards_G - low) / (high - low).clamp(min=torch.finfo(rewards_G.dtype).tiny)
    odds = ((len(scaled_G) * scaled_G.mean() + 0.5) / (len(scaled_G) + 1)).logit()
    known_GN, counts_G = uncertainties_GN.where(exists_GN, 0.0), exists_GN.sum(1)
    values_GN = torch.sigmoid(odds - known_GN + known_GN.sum(0) / exists_GN.sum(0).clamp(min=1))
    values_GN = values_GN.scatter(
        1, (counts_G - 1).clamp(min=0).unsqueeze(1), scaled_G.to(values_GN.dtype).unsqueeze(1)
    )
    before_GN = torch.cat([scaled_G.mean().to(values_GN.dtype).expand(len(scaled_G), 1), values_GN[:, :-1]], 1)
    credit_GN = (values_GN - before_GN).where(exists_GN, 0.0)
    return counts_G.unsqueeze(1) * credit_GN / (scaled_G.std(correction=0) + eps)


def step_credit(uncertainties_GT: Tensor, judged_GT: Tensor) -> Tensor:
    """Eq 20 (ours). `credit_weight`: the mean U of the group's judged tokens less a token's own; 0 where nothing was judged."""
    mean = uncertainties_GT.where(judged_GT, 0.0).sum() / judged_GT.sum().clamp(min=1)
    return (mean - uncertainties_GT).where(judged_GT, 0.0)
