"""Pure functions shared by several objectives. Padding is masked first, so that it reaches no loss or gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from e3rl.equations import policy
from e3rl.equations.erpo import group_advantages
from e3rl.objectives.base import GroupSignals, Need, TrainBatch, TrajectoriesOnly


def token_log_ratios(batch: TrainBatch) -> Tensor:
    """log pi/pi_old of every token, [S, T]; 0 outside the mask."""
    return (batch.logprobs_ST - batch.old_logprobs_ST).masked_fill(~batch.mask_ST, 0.0)


def lengths(batch: TrainBatch) -> Tensor:
    """Number of tokens in each sequence's loss, [S]; 1 if there are none, so that it can be a divisor."""
    return batch.mask_ST.sum(-1).clamp(min=1)


def count_segments(segments_ST: Tensor) -> int:
    """Segments of the longest sequence, at least 1."""
    return max(int(segments_ST.max()) + 1, 1)


def masked_segments(batch: TrainBatch) -> tuple[Tensor, int]:
    """Segment indices with -1 outside the loss mask, and the number of segments."""
    segments_ST = batch.segments_ST.masked_fill(~batch.mask_ST, -1)
    return segments_ST, count_segments(segments_ST)


def from_segments(values_GN: Tensor, segments_GT: Tensor) -> Tensor:
    """The value of the segment that each token lies in, [G, T]; 0 in padding."""
    return values_GN.gather(-1, segments_GT.clamp(min=0)).where(segments_GT >= 0, 0.0)


REWARDS_ONLY = frozenset[Need]({"rewards_only"})
"""The advantages depend only on rewards, mask and segments."""


def kl_needs(kl_coef: float) -> frozenset[Need]:
    """The reference policy is needed only if its KL term has a weight."""
    return frozenset({"reference"}) if kl_coef > 0 else frozenset()


def kl_terms(batch: TrainBatch, kl_coef: float) -> Tensor:
    """k3 estimate of KL(pi || reference) of every token, [S, T]; 0 in padding and where it has no weight."""
    if kl_coef == 0:
        return torch.zeros_like(batch.logprobs_ST)
    if batch.reference_logprobs_ST is None:
        raise ValueError("kl_coef > 0, but the batch has no reference log-probabilities")
    outside = ~batch.mask_ST
    return policy.k3_kl(
        batch.logprobs_ST.masked_fill(outside, 0.0), batch.reference_logprobs_ST.masked_fill(outside, 0.0)
    )


def on_tokens(values_G: Tensor, mask_GT: Tensor) -> Tensor:
    """One value per sequence, expanded to its tokens, [G, T]; 0 in padding."""
    return values_G[:, None] * mask_GT


def centred(signals: GroupSignals) -> Tensor:
    """R - mean, [G, T]; 0 in padding."""
    return on_tokens(signals.rewards_G - signals.rewards_G.mean(), signals.mask_GT)


class GroupNormalised(TrajectoriesOnly):
    """Base for objectives whose advantage is the group-normalised reward, the same on every token of a response."""

    kl_coef: float
    advantage_eps: float
    scale_rewards = "group"

    @property
    def needs(self) -> frozenset[Need]:
        """The reference policy, if its KL term has a weight."""
        return kl_needs(self.kl_coef) | REWARDS_ONLY

    def advantages(self, signals: GroupSignals) -> Tensor:
        """(R - mean) / (std + advantage_eps), [G, T], or R - mean where scale_rewards is "none"; 0 in padding."""
        if self.scale_rewards == "none":
            return centred(signals)
        return on_tokens(group_advantages(signals.rewards_G, self.advantage_eps), signals.mask_GT)


def token_mean(values_ST: Tensor, batch: TrainBatch) -> Tensor:
    """This micro-batch's part of the mean over all tokens of the step."""
    return values_ST.masked_fill(~batch.mask_ST, 0.0).sum() / batch.totals.tokens


def sequence_mean(values_ST: Tensor, batch: TrainBatch) -> Tensor:
    """This micro-batch's part of the mean over the step's sequences of each sequence's token mean."""
    sums_S = values_ST.masked_fill(~batch.mask_ST, 0.0).sum(-1)
    return (sums_S / lengths(batch)).sum() / batch.totals.sequences


def sequence_sum(values_ST: Tensor, batch: TrainBatch) -> Tensor:
    """This micro-batch's part of the mean over the step's sequences of each sequence's token sum."""
    return values_ST.masked_fill(~batch.mask_ST, 0.0).sum() / batch.totals.sequences


def limit_mean(values_ST: Tensor, batch: TrainBatch) -> Tensor:
    """This micro-batch's part of the step's sum over tokens divided by the most tokens its sequences could have."""
    values = values_ST.masked_fill(~batch.mask_ST, 0.0).sum()
    return values / (batch.totals.sequences * batch.totals.completion_limit)
