"""Group-normalised advantages: paper §3.3 (eq 20), and the sequence-level ones of its ablations."""

from __future__ import annotations

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
