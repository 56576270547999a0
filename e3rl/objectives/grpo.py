"""GRPO: group-normalised rewards as advantages, token ratios, symmetric clip, KL to the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from e3rl.objectives import _clipped
from e3rl.objectives import _common as common
from e3rl.objectives.base import Loss, TrainBatch
from e3rl.settings import PAPER, setting


@dataclass(frozen=True)
class GRPO(_clipped.TokenRatios, common.GroupNormalised):
    """Group relative policy optimisation (ERPO paper, eq 3-5)."""

    kl_coef: float = setting(0.04, "beta, weight of the KL term; 0 needs no reference policy", source=PAPER, min=0)
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low", source="TRL", min=0, max=1)
    clip_high: float = setting(0.2, "the ratio is clipped above 1 + clip_high", source="TRL", min=0)
    average: Literal["token", "sequence"] = setting(
        "token", "mean over all tokens (eq 5), or of each response's own mean (DeepSeekMath)", source="ERPO paper"
    )
    scale_rewards: Literal["group", "none"] = setting(
        "group", "divide advantages by the group's standard deviation, or not", source="TRL"
    )
    advantage_eps: float = setting(1e-4, "added to the standard deviation of the rewards", source="TRL", above=0)

    @property
    def divides_by(self) -> str:
        """The count that ``average`` takes the mean over."""
        return "tokens" if self.average == "token" else "sequences"

    def loss(self, batch: TrainBatch) -> Loss:
        """Clipped surrogate less weighted KL, averaged, negated."""
        mean = common.token_mean if self.average == "token" else common.sequence_mean
        return self.clipped(batch, mean)
