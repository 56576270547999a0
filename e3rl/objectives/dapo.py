"""DAPO: decoupled clip, mean over tokens, no KL. Dynamic sampling and overlong shaping are done elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from e3rl.objectives import _clipped
from e3rl.objectives import _common as common
from e3rl.objectives.base import Loss, TrainBatch
from e3rl.settings import setting


@dataclass(frozen=True)
class DAPO(_clipped.TokenRatios, common.GroupNormalised):
    """Decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476), its loss."""

    kl_coef: float = setting(0.0, "weight of the KL term; 0 needs no reference policy", source="DAPO paper", min=0)
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low", source="DAPO paper", min=0, max=1)
    clip_high: float = setting(0.28, "the ratio is clipped above 1 + clip_high", source="DAPO paper", min=0)
    scale_rewards: Literal["group", "none"] = setting(
        "group", "divide advantages by the group's standard deviation, or not", source="TRL"
    )
    advantage_eps: float = setting(1e-4, "added to the standard deviation of the rewards", source="TRL", above=0)

    divides_by = "tokens"

    def loss(self, batch: TrainBatch) -> Loss:
        """Clipped surrogate, averaged over all tokens of the step, negated."""
        return self.clipped(batch, common.token_mean)
