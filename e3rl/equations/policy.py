"""Autoregressive policy, segments and the clipped objective: paper §2, §3.1 and the end of §3.3 (eq 1-9, 21-22).

Shapes: V vocabulary, D width, T tokens, N segments, G siblings, S sequences. Positions and segments count from 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_logprob(token_logprobs_T: Tensor) -> Tensor:
    """Eq 1. log p(y|x): the sum of the tokens' conditional log-probabilities."""
    return token_logprobs_T.sum(-1)


def token_distribution(hidden_D: Tensor, output_embedding_VD: Tensor, temperature: float) -> Tensor:
    """Eq 2-3. Next-token log-probabilities [..., V] from the decoder's hidden state [..., D]."""
    return torch.log_softmax(hidden_D @ output_embedding_VD.T / temperature, -1)


def greedy_token(logprobs_V: Tensor) -> Tensor:
    """Eq 4. The likeliest token."""
    return logprobs_V.argmax(-1)


def perturbation(logprobs_V: Tensor, ids: Tensor) -> Tensor:
    """Eq 5. log p(argmax) - log p(sampled) >= 0, from log-probabilities [..., V] and sampled ids [...]."""
    return logprobs_V.amax(-1) - logprobs_V.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def cumulative_perturbation(perturbations_T: Tensor) -> Tensor:
    """Eq 6. E_1:k for every prefix length k."""
    return perturbations_T.cumsum(-1)


def affected_positions(t: int, length: int) -> range:
    """Eq 7. The later positions whose distribution is conditioned on the token at position ``t``."""
    return range(t + 1, length)


def segment_bounds(length: int, segment_length: int) -> list[tuple[int, int]]:
    """Eq 8. (start, stop) of every segment of ``length`` tokens; the last one may be shorter."""
    return [(start, min(start + segment_length, length)) for start in range(0, length, segment_length)]


def segment_logprob(token_logprobs_T: Tensor, start: int, stop: int) -> Tensor:
    """Eq 9. log p(s_n | x, s_<n) of the segment that spans ``start:stop``."""
    return token_logprobs_T[..., start:stop].sum(-1)


def segment_sums(values_ST: Tensor, segments_ST: Tensor, num_segments: int) -> Tensor:
    """Eq 9. Sum of the tokens' values by segment, [S, N]. Tokens of segment -1 are ignored, NaN ones too."""
    index_ST = segments_ST.where(segments_ST >= 0, num_segments)
    sums = values_ST.new_zeros((*values_ST.shape[:-1], num_segments + 1))
    return sums.scatter_add(-1, index_ST, values_ST)[..., :num_segments]


def segment_log_ratios(logprobs_ST: Tensor, old_logprobs_ST: Tensor, segments_ST: Tensor, num_segments: int) -> Tensor:
    """Eq 22. log rho_n [S, N]: the sum of the segment's token log-ratios, so the ratio of eq 9's probabilities."""
    return segment_sums(logprobs_ST - old_logprobs_ST, segments_ST, num_segments)


def segment_mean_log_ratios(
    logprobs_ST: Tensor, old_logprobs_ST: Tensor, segments_ST: Tensor, num_segments: int
) -> Tensor:
    """Eq 22. log of rho_n's |s_n|-th root [S, N] (D13 'segment_mean'); 0 for a segment that does not exist."""
    lengths_SN = segment_sums(torch.ones_like(logprobs_ST), segments_ST, num_segments)
    return segment_log_ratios(logprobs_ST, old_logprobs_ST, segments_ST, num_segments) / lengths_SN.clamp_min(1)


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Eq 21. min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), elementwise."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def k3_kl(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Eq 21. Low-variance estimate of D_KL(pi || pi_ref) per token: e^d - d - 1 with d = log pi_ref - log pi."""
    difference = reference_logprobs - logprobs
    return torch.expm1(difference) - difference


def objective(
    logprobs_GT: Tensor,
    old_logprobs_GT: Tensor,
    reference_logprobs_GT: Tensor,
    segments_GT: Tensor,
    advantages_GN: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
) -> Tensor:
    """Eq 21. J of one group, to maximise: (1/G) sum_i [sum_n surrogate_n - kl_coef sum_t KL_t].

    Padding (segment -1) and segments that a sibling does not have contribute nothing.
    """
    num_segments = advantages_GN.shape[-1]
    ratios_GN = segment_log_ratios(logprobs_GT, old_logprobs_GT, segments_GT, num_segments).exp()
    exists_GN = segment_sums(torch.ones_like(logprobs_GT), segments_GT, num_segments) > 0
    surrogate_GN = clipped_surrogate(ratios_GN, advantages_GN, clip_low, clip_high).where(exists_GN, 0)
    kl_GN = segment_sums(k3_kl(logprobs_GT, reference_logprobs_GT), segments_GT, num_segments)
    return (surrogate_GN - kl_coef * kl_GN).sum(-1).mean()
