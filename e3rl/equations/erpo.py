"""ERPO: entropy-aware gating, bucketed implicit advantage, outcome-anchored synthesis (ERPO paper, §2-3).

Its policy (eq 1), KL (eq 4), loss (eq 5) and entropy (eq 6) are functions of `policy` and `tokens`. All statistics are over
one group, with the population standard deviation unless said otherwise; no state is kept between groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from e3rl.equations.policy import segment_sums


def group_advantages(rewards_G: Tensor, eps: float) -> Tensor:
    """ERPO eq 3. (r - mean) / (std + eps) with the sample standard deviation; 0 for one response or equal rewards."""
    if bool((rewards_G == rewards_G[:1]).all()):
        return torch.zeros_like(rewards_G)
    return (rewards_G - rewards_G.mean()) / (rewards_G.std() + eps)


def progress_signal(logprobs_GT: Tensor, reference_logprobs_GT: Tensor, beta_progress: float) -> Tensor:
    """ERPO eq 7. s: confidence gained over the reference policy."""
    return beta_progress * (logprobs_GT - reference_logprobs_GT)


def normalized(values_GT: Tensor, mask_GT: Tensor, eps: float) -> Tensor:
    """ERPO eq 10, 16. Norm_G: z-score over all real tokens of the group, [G, T]; 0 in padding."""
    real = values_GT[mask_GT]
    return ((values_GT - real.mean()) / (real.std(correction=0) + eps)).where(mask_GT, 0.0)


def entropy_gate(entropies_GT: Tensor, mask_GT: Tensor, gamma: float, eps: float) -> Tensor:
    """ERPO eq 8. W in (0, 1): larger where the policy was less certain than usual in this group; 0 in padding."""
    return torch.sigmoid(gamma * normalized(entropies_GT, mask_GT, eps)).where(mask_GT, 0.0)


def progress_buckets(mask_GT: Tensor, buckets: int) -> Tensor:
    """ERPO eq 9. Bucket floor(tau K) of every token, tau = t/|o| with t from 0, so in 0..K-1; -1 in padding."""
    positions_GT = mask_GT.cumsum(-1) - 1
    return (positions_GT * buckets // mask_GT.sum(-1, keepdim=True).clamp(min=1)).where(mask_GT, -1)


def bucket_normalized(signal_GT: Tensor, buckets_GT: Tensor, buckets: int, eps: float) -> Tensor:
    """ERPO eq 9. z-score of each token among all tokens of its group in the same bucket; 0 in padding."""
    signal_T, index_T = signal_GT.reshape(-1), buckets_GT.reshape(-1)
    count_K = segment_sums(torch.ones_like(signal_T), index_T, buckets).clamp(min=1)
    at = index_T.clamp(min=0)
    centred_T = signal_T - (segment_sums(signal_T, index_T, buckets) / count_K)[at]
    std_K = (segment_sums(centred_T.square(), index_T, buckets) / count_K).sqrt()
    return (centred_T / (std_K[at] + eps)).where(index_T >= 0, 0.0).reshape(signal_GT.shape)


def calibrated_progress(
    gate_GT: Tensor, advantages_G: Tensor, signal_GT: Tensor, mask_GT: Tensor, sigma_target: float, eps: float
) -> Tensor:
    """ERPO eq 10. Psi: gated, signed progress, rescaled so that its spread over the active tokens is sigma_target.

    Active: real tokens of responses whose advantage is not 0; Psi is 0 elsewhere.
    """
    active_GT = mask_GT & (advantages_G != 0)[:, None]
    if not bool(active_GT.any()):
        return torch.zeros_like(signal_GT)
    raw_GT = gate_GT * advantages_G.sign()[:, None] * signal_GT
    return (sigma_target * raw_GT / (raw_GT[active_GT].std(correction=0) + eps)).where(active_GT, 0.0)


def synthesized_advantages(advantages_G: Tensor, psi_GT: Tensor, mask_GT: Tensor, eta: float, eps: float) -> Tensor:
    """ERPO eq 10. Final advantages Norm_G(A + eta Psi): zero sum and unit variance over the group (eq 16)."""
    return normalized(advantages_G[:, None] + eta * psi_GT, mask_GT, eps)
