"""Sequences, segments, ratios and the clipped objective: paper §2, §3.1 and the end of §3.3 (eq 1, 8-9, 21-22).

Shapes: S sequences, G siblings of a group, T response positions padded right, N segments. Segments count from 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Ratios are capped at e^20: an overflow would turn the zero gradient of a clipped term into NaN."""


def sequence_logprobs(logprobs_ST: Tensor, mask_ST: Tensor) -> Tensor:
    """Eq 1; ERPO eq 1. log p(y|x), or the sum of any other numbers, over each sequence's real tokens, [S]."""
    return logprobs_ST.masked_fill(~mask_ST, 0.0).sum(-1)


def sequence_mean_log_ratios(log_ratios_ST: Tensor, mask_ST: Tensor) -> Tensor:
    """ERPO eq 1. log of the length-th root of pi(y|x) / pi_old(y|x), [S]; 0 for a sequence without tokens."""
    return sequence_logprobs(log_ratios_ST, mask_ST) / mask_ST.sum(-1).clamp(min=1)


def segment_sums(values_ST: Tensor, segments_ST: Tensor, num_segments: int) -> Tensor:
    """Eq 9. Sum of the tokens' values by segment, [S, N]. Tokens of segment -1 are ignored, NaN ones too."""
    index_ST = segments_ST.where(segments_ST >= 0, num_segments)
    sums = values_ST.new_zeros((*values_ST.shape[:-1], num_segments + 1))
    return sums.scatter_add(-1, index_ST, values_ST)[..., :num_segments]


def segment_log_ratios(logprobs_ST: Tensor, old_logprobs_ST: Tensor, segments_ST: Tensor, num_segments: int) -> Tensor:
    """Eq 22. log rho_n [S, N]: the sum of the segment's token log-ratios, which is the log-ratio of eq 9's probabilities."""
    return segment_sums(logprobs_ST - old_logprobs_ST, segments_ST, num_segments)


def segment_mean_log_ratios(
    logprobs_ST: Tensor, old_logprobs_ST: Tensor, segments_ST: Tensor, num_segments: int
) -> Tensor:
    """Eq 22. log of rho_n's |s_n|-th root [S, N] (`ratio` = 'segment_mean'); 0 for a segment that does not exist."""
    lengths_SN = segment_sums(torch.ones_like(logprobs_ST), segments_ST, num_segments)
    return segment_log_ratios(logprobs_ST, old_logprobs_ST, segments_ST, num_segments) / lengths_SN.clamp_min(1)


def ratios(log_ratios: Tensor) -> Tensor:
    """Eq 22. rho from its logarithm, capped at e^20."""
    return log_ratios.clamp(max=MAX_LOG_RATIO).exp()


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Eq 21; ERPO eq 5. min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), elementwise."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def clipped(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Eq 21. Where the clip is active, so that the surrogate has no gradient (bool). A metric, not part of the loss."""
    return ((ratio > 1 + clip_high) & (advantage > 0)) | ((ratio < 1 - clip_low) & (advantage < 0))


def k3_kl(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Eq 21; ERPO eq 4. Low-variance estimate of D_KL(pi || pi_ref) per token: e^d - d - 1 with d = log pi_ref - log pi."""
    difference = reference_logprobs - logprobs
    return torch.expm1(difference) - difference


def penalized(surrogate: Tensor, kl: Tensor, kl_coef: float) -> Tensor:
    """Eq 21; ERPO eq 5. The quantity to maximise: the surrogate minus the weighted KL, elementwise."""
    return surrogate - kl_coef * kl


def segment_objective(surrogate_SN: Tensor, exists_SN: Tensor, kl_ST: Tensor, kl_coef: float) -> Tensor:
    """Eq 21. sum_n surrogate_n - kl_coef sum_t KL_t of each sequence, [S]. Segments that do not exist add nothing."""
    return penalized(surrogate_SN.where(exists_SN, 0.0).sum(-1), kl_ST.sum(-1), kl_coef)


def group_mean(objective_S: Tensor, group_sizes_S: Tensor, groups: int) -> Tensor:
    """Eq 21. J: the mean over the step's groups of each group's mean. Parts of the step's sequences give summands of J."""
    return (objective_S / (groups * group_sizes_S)).sum()
