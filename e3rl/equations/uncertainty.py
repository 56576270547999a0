"""Epistemic entropy monitoring: paper §3.2 (eq 10-13). Entropies are in nats."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from e3rl.equations._number import Number, as_tensor


def token_entropy(logits_V: Tensor) -> Tensor:
    """Eq 10. H_t = -sum_v p(v) log p(v), from logits [..., V] that already carry the temperature (D1).

    A logit of -inf is a token of probability 0 and adds nothing.
    """
    logprobs_V = torch.log_softmax(logits_V, -1)
    finite_V = logprobs_V.masked_fill(logprobs_V == -torch.inf, 0.0)
    return -(logprobs_V.exp() * finite_V).sum(-1)


def segment_entropy(entropies_T: Tensor) -> Tensor:
    """Eq 10. H-bar_n: mean token entropy over the candidate's real tokens."""
    return entropies_T.mean(-1)


def smooth_causal(means_N: Tensor, decay: float, window: int) -> Tensor:
    """Eq 11. H~ of the last of the segments so far, [..., N]: w runs over -W..0, as later segments do not exist yet (D2)."""
    recent_W = means_N[..., -(window + 1) :]
    weights_W, total = _smoothing_weights(recent_W.shape[-1], decay, means_N.dtype, means_N.device)
    return (weights_W * recent_W).sum(-1) / total


@functools.cache
def _smoothing_weights(count: int, decay: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Eq 11's weights of so many segments, the last one's 1, and their sum."""
    weights_W = decay ** torch.arange(count - 1, -1, -1, dtype=dtype, device=device)
    return weights_W, weights_W.sum()


def smooth_centered(means_N: Tensor, decay: float, window: int) -> Tensor:
    """Eq 11. H~_n of every segment of a finished trajectory: w runs over -W..W where n + w exists. For reports only."""
    index_N = torch.arange(len(means_N), device=means_N.device)
    distance_NN = (index_N[:, None] - index_N[None, :]).abs()
    weights_NN = (decay ** distance_NN.to(means_N.dtype)).where(distance_NN <= window, 0.0)
    return weights_NN @ means_N / weights_NN.sum(-1)


def largest_entropy(entropies_T: Tensor) -> Tensor:
    """Eq 12. H_n^max: the largest token entropy of the candidate."""
    return entropies_T.amax(-1)


def entropy_variation(entropies_T: Tensor) -> Tensor:
    """Eq 12. Delta H_n: mean |H_{t+1} - H_t| inside the candidate; 0 for a single token."""
    steps = max(entropies_T.shape[-1] - 1, 1)
    return entropies_T.diff().abs().sum(-1) / steps


def extremum_deviation(largest: Number, mean_E: Number, std_E: Number, eps: float = 1e-6) -> Tensor:
    """Eq 13. sigmoid((H_n^max - mu_E) / (sigma_E + eps)): how far the peak stands out of the reference entropies."""
    return torch.sigmoid(as_tensor((largest - mean_E) / (std_E + eps)))


def length_weight(tokens: int, exponent: float) -> float:
    """What eq 13's terms are multiplied by, n^x for a candidate of n tokens: 1 in the paper (x = 0). A mean is blind to a long
    answer that wanders calmly."""
    return float(tokens**exponent)


def uncertainty_terms(
    smoothed: Number,
    variation: Number,
    extremum: Number,
    mean_perturbation: Number,
    *,
    base_weight: float,
    gradient_weight: float,
    extremum_weight: float,
    perturbation_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eq 13. The weighted terms of U: base, gradient, extremum, and the perturbation term of D14."""
    return (
        base_weight * as_tensor(smoothed),
        gradient_weight * as_tensor(variation),
        extremum_weight * as_tensor(extremum),
        perturbation_weight * as_tensor(mean_perturbation),
    )


def uncertainty(
    smoothed: Number,
    variation: Number,
    extremum: Number,
    mean_perturbation: Number,
    *,
    base_weight: float,
    gradient_weight: float,
    extremum_weight: float,
    perturbation_weight: float,
) -> Tensor:
    """Eq 13. Segment uncertainty U_n. The paper's has base_weight 1 and perturbation_weight 0 (D14)."""
    base, gradient, peak, perturbed = uncertainty_terms(
        smoothed,
        variation,
        extremum,
        mean_perturbation,
        base_weight=base_weight,
        gradient_weight=gradient_weight,
        extremum_weight=extremum_weight,
        perturbation_weight=perturbation_weight,
    )
    return base + gradient + peak + perturbed
