"""E3RL: a reward divided among segments by attention, segment ratios, clip, KL to the reference (paper §3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from e3rl.equations import advantage, attribution, policy
from e3rl.errors import UserError
from e3rl.objectives import _common as common
from e3rl.objectives import metrics
from e3rl.objectives.base import GroupSignals, Loss, Need, TrainBatch
from e3rl.settings import PAPER, PAPER_METHOD, setting


@dataclass(frozen=True)
class E3RL:
    """Segment-level optimisation (eq 19-22)."""

    kl_coef: float = setting(0.04, "beta, weight of the KL term; 0 needs no reference policy", source=PAPER, min=0)
    clip_low: float = setting(0.2, "the segment ratio is clipped below 1 - clip_low", min=0, max=1)
    clip_high: float = setting(0.2, "the segment ratio is clipped above 1 + clip_high", min=0)
    allocation: Literal["causal", "sequence", "anchored", "value"] = setting(
        "causal",
        "reward divided by attention, undivided, divided with its sign kept, or by what U says each segment changed",
        source=PAPER_METHOD,
    )
    ratio: Literal["segment", "segment_mean"] = setting(
        "segment", "ratio of segment probabilities, or its root of the segment's length", source=PAPER_METHOD
    )
    degenerate_groups: Literal["zero", "paper"] = setting(
        "zero", "no advantages where all sequence rewards are equal, or eq 20 unchanged"
    )
    erased: Literal["drop", "contrast"] = setting(
        "drop",
        "ignore erased candidates, or make them less likely if their replacement was rewarded",
        source=PAPER_METHOD,
    )
    contrast_weight: float = setting(1.0, "lambda_C, size of an erased candidate's negative advantage", above=0)
    credit_weight: float = setting(
        0.0, "weight of a segment's credit, the group's mean U less its own, beside its advantage; 0: none", min=0
    )
    credit_groups: Literal["all", "mixed"] = setting(
        "all", "groups whose segments get credit: all, or none where all sequence rewards are equal"
    )
    attribution_window: int = setting(64, "L', last response tokens whose attention divides the reward (eq 19)", min=1)
    attribution_layers: Literal["last", "all"] = setting("last", "layers whose attention divides the reward")
    advantage_eps: float = setting(1e-4, "epsilon of eq 20, added to the standard deviation", above=0)

    divides_by = "groups"

    @property
    def needs(self) -> frozenset[Need]:
        found: set[Need] = {"rewards_only" if self.allocation in ("sequence", "value") else "shares"}
        if self.allocation == "value" or self.credit_weight:
            found.add("uncertainties")
        if self.erased == "contrast":
            found.add("erased")
        return common.kl_needs(self.kl_coef) | found

    def advantages(self, signals: GroupSignals) -> Tensor:
        """Advantage of the segment that each token lies in; UserError where credit is asked for and nothing was judged."""
        alike = bool(advantage.is_degenerate(signals.rewards_G))
        if self.degenerate_groups == "zero" and alike:
            rewarded_GT = torch.zeros_like(signals.old_logprobs_GT)
        else:
            rewarded_GT = common.from_segments(self._segment_advantages(signals), signals.segments_GT)
        if not self.credit_weight:
            return rewarded_GT
        u_GT = _judged(signals, "objective.credit_weight")
        if self.credit_groups == "mixed" and alike:
            return rewarded_GT
        return rewarded_GT + self.credit_weight * advantage.step_credit(u_GT, signals.mask_GT & (u_GT >= 0))

    def _segment_advantages(self, signals: GroupSignals) -> Tensor:
        num_segments = common.count_segments(signals.segments_GT)
        sequence_G = advantage.sequence_advantages(signals.rewards_G, self.advantage_eps)
        if self.allocation == "sequence":
            return sequence_G[:, None].expand(-1, num_segments)
        if self.allocation == "value":
            return self._value_advantages(signals, num_segments)
        if signals.shares_GT is None:
            raise ValueError("attention shares are needed to divide a reward")
        shares_GN = policy.segment_sums(signals.shares_GT, signals.segments_GT, num_segments)
        if self.allocation == "anchored":
            return advantage.anchored_advantages(sequence_G, shares_GN, signals.segments_GT.amax(-1) + 1)
        return advantage.segment_advantages(
            attribution.segment_rewards(signals.rewards_G, shares_GN), self.advantage_eps
        )

    def _value_advantages(self, signals: GroupSignals, num_segments: int) -> Tensor:
        """UserError where nothing was judged."""
        u_GT, segments_GT = _judged(signals, "objective.allocation = 'value'"), signals.segments_GT
        lengths_GN = policy.segment_sums(torch.ones_like(u_GT), segments_GT, num_segments)
        u_GN = policy.segment_sums(u_GT, segments_GT, num_segments) / lengths_GN.clamp(min=1)
        return advantage.value_advantages(signals.rewards_G, u_GN, lengths_GN > 0, self.advantage_eps)

    def erased_advantage(self, reward: float) -> float:
        """Negative for an erased candidate whose replacement was rewarded, else 0."""
        return -self.contrast_weight if reward > 0 else 0.0

    def loss(self, batch: TrainBatch) -> Loss:
        """Segment surrogates of a sequence, minus its weighted KL; mean over the group, then over groups; negated."""
        segments_ST, num_segments = common.masked_segments(batch)
        log_ratios = policy.segment_log_ratios if self.ratio == "segment" else policy.segment_mean_log_ratios
        ratios_SN = policy.ratios(log_ratios(batch.logprobs_ST, batch.old_logprobs_ST, segments_ST, num_segments))
        lengths_SN = policy.segment_sums(torch.ones_like(batch.logprobs_ST), segments_ST, num_segments)
        advantages_SN = policy.segment_sums(batch.advantages_ST, segments_ST, num_segments) / lengths_SN.clamp(min=1)
        surrogate_SN = policy.clipped_surrogate(ratios_SN, advantages_SN, self.clip_low, self.clip_high)
        kl_ST = common.kl_terms(batch, self.kl_coef).where(~batch.erased_S[:, None], 0.0)
        objective_S = policy.segment_objective(surrogate_SN, lengths_SN > 0, kl_ST, self.kl_coef)
        value = -policy.group_mean(objective_S, batch.group_sizes_S, batch.totals.groups)
        clipped_SN = policy.clipped(ratios_SN, advantages_SN, self.clip_low, self.clip_high)
        measures = metrics.measured(lengths_SN > 0, {"clip_fraction": clipped_SN, "ratio": ratios_SN})
        measures |= metrics.measured_by_segment("clip_fraction", clipped_SN, lengths_SN > 0)
        measures |= metrics.measured(batch.mask_ST & ~batch.erased_S[:, None], {"kl": kl_ST})
        return Loss(value, measures)


def _judged(signals: GroupSignals, what: str) -> Tensor:
    """U of each token's segment; UserError where nothing was judged."""
    if signals.uncertainties_GT is None:
        raise UserError(
            f"{what} needs U of each segment: set rollout.erase = true, and erasure.metric = 'value' for the critic's (with "
            "erasure.max_erasures = 0 nothing is erased)"
        )
    return signals.uncertainties_GT
