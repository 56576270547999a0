"""Dr. GRPO: GRPO without the two divisions that favour short right answers and easy or hard prompts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from e3rl.objectives import _clipped
from e3rl.objectives import _common as common
from e3rl.objectives.base import GroupSignals, Loss, Need, TrainBatch
from e3rl.settings import setting


@dataclass(frozen=True)
class DrGRPO(_clipped.TokenRatios):
    """GRPO done right (arXiv 2503.20783): no standard deviation, no response length."""

    kl_coef: float = setting(0.0, "weight of the KL term; 0 needs no reference policy", source="Dr. GRPO paper", min=0)
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low", source="Dr. GRPO paper", min=0, max=1)
    clip_high: float = setting(0.2, "the ratio is clipped above 1 + clip_high", source="Dr. GRPO paper", min=0)

    divides_by = "sequences"

    @property
    def needs(self) -> frozenset[Need]:
        return common.kl_needs(self.kl_coef) | common.REWARDS_ONLY

    def advantages(self, signals: GroupSignals) -> Tensor:
        """The reward less the group's mean, on every token."""
        return common.centred(signals)

    def loss(self, batch: TrainBatch) -> Loss:
        """Sum over tokens divided by the most tokens the sequences could have: a constant."""
        return self.clipped(batch, common.limit_mean)
