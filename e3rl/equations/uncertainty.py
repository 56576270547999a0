"""Epistemic entropy monitoring: paper §3.2 (eq 6, 10-13). Entropies are in nats.

Shapes: G candidates of one segment index and T tokens each, behind N - 1 committed segments.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def segment_entropy(entropies_GT: Tensor) -> Tensor:
    """Eq 10. H-bar_n: mean token entropy over the candidate's real tokens."""
    return entropies_GT.mean(-1)


def segment_perturbation(perturbations_GT: Tensor) -> Tensor:
    """Eq 6. Mean perturbation per token of the candidate: the term that `perturbation_weight` weights."""
    return perturbations_GT.mean(-1)


def smooth_causal(means_GN: Tensor, decay: float, window: int) -> Tensor:
    """Eq 11. H~ of the newest segment, [G]: w runs over -W..0, since later segments do not exist yet."""
    recent_GW = means_GN[..., -(window + 1) :]
    weights_W, total = _smoothing_weights(recent_GW.shape[-1], decay, means_GN.dtype, means_GN.device)
    return (weights_W * recent_GW).sum(-1) / total


@functools.cache
def _smoothing_weights(count: int, decay: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Eq 11's weights of ``count`` segments (the last one has 1), and their sum."""
    weights_W = decay ** torch.arange(count - 1, -1, -1, dtype=dtype, device=device)
    return weights_W, weights_W.sum()


def largest_entropy(entropies_GT: Tensor) -> Tensor:
    """Eq 12. H_n^max: the largest token entropy of the candidate."""
    return entropies_GT.amax(-1)


def entropy_variation(entropies_GT: Tensor) -> Tensor:
    """Eq 12. Delta H_n: mean |H_{t+1} - H_t| inside the candidate; 0 for a single token."""
    steps = max(entropies_GT.shape[-1] - 1, 1)
    return entropies_GT.diff().abs().sum(-1) / steps


def extremum_deviation(largest_G: Tensor, mean_E: float, std_E: float, eps: float = 1e-6) -> Tensor:
    """Eq 13. sigmoid((H_n^max - mu_E) / (sigma_E + eps)): how far the peak is above the group's or batch's entropies."""
    return torch.sigmoid((largest_G - mean_E) / (std_E + eps))


def length_weight(tokens: int, exponent: float) -> float:
    """Factor of eq 13's terms: n^x for a candidate of n tokens, 1 in the paper (x = 0). A mean alone can't tell a long answer
    of low entropy from a short one."""
    return float(tokens**exponent)


def uncertainty_terms(
    smoothed_G: Tensor,
    variation_G: Tensor,
    extremum_G: Tensor,
    perturbation_G: Tensor,
    *,
    base_weight: float,
    gradient_weight: float,
    extremum_weight: float,
    perturbation_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eq 13. The weighted terms of U. In the paper base_weight is 1 and perturbation_weight 0."""
    return (
        base_weight * smoothed_G,
        gradient_weight * variation_G,
        extremum_weight * extremum_G,
        perturbation_weight * perturbation_G,
    )


def uncertainty(base: float, gradient: float, extremum: float, perturbation: float) -> float:
    """Eq 13. U_n of a candidate, the sum of its weighted terms."""
    return base + gradient + extremum + perturbation
