"""GRPO: group-normalised rewards as advantages, token ratios, symmetric clip, KL to the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from e3rl.config import PAPER, setting
from e3rl.equations.policy import clipped_surrogate
from e3rl.objectives import _common as common
from e3rl.objectives.base import GroupSignals, Loss, Need, TrainBatch, TrajectoriesOnly


@dataclass(frozen=True)
class GRPO(TrajectoriesOnly):
    """Group relative policy optimisation (ERPO paper, eq 3-5)."""

    kl_coef: float = setting(0.04, "beta, weight of the KL term; 0 needs no reference policy", source=PAPER, min=0)
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low", source="TRL", min=0, max=1)
    clip_high: float = setting(0.2, "the ratio is clipped above 1 + clip_high", source="TRL", min=0)
    average: Literal["token", "sequence"] = setting(
        "token",
        "mean over all tokens (eq 5), or over responses of each one's mean (DeepSeekMath)",
        source="ERPO paper, eq 5",
    )
    advantage_eps: float = setting(1e-4, "delta of eq 3, added to the standard deviation", source="TRL", above=0)

    @property
    def needs(self) -> frozenset[Need]:
        return common.kl_needs(self.kl_coef)

    def advantages(self, signals: GroupSignals) -> Tensor:
        """ERPO eq 3. The group-normalised reward, on every token."""
        return common.on_tokens(common.standardized(signals.rewards_G, self.advantage_eps), signals.mask_GT)

    def loss(self, batch: TrainBatch) -> Loss:
        """ERPO eq 5. Clipped surrogate minus weighted KL, averaged, negated."""
        ratios_ST = common.bounded_exp(common.token_log_ratios(batch))
        advantages_ST = batch.advantages_ST
        surrogate_ST = clipped_surrogate(ratios_ST, advantages_ST, self.clip_low, self.clip_high)
        kl_ST = common.kl_terms(batch, self.kl_coef)
        mean = common.token_mean if self.average == "token" else common.sequence_mean
        clipped_ST = common.clipped(ratios_ST, advantages_ST, self.clip_low, self.clip_high)
        metrics = {"clip_fraction": clipped_ST, "ratio": ratios_ST, "kl": kl_ST}
        return Loss(-mean(surrogate_ST - self.kl_coef * kl_ST, batch), common.measured(batch.mask_ST, metrics))
