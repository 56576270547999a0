"""CISPO: the ratio, held at a cap, weighs the token's gradient; no token is left out for its ratio."""

from __future__ import annotations

from dataclasses import dataclass

from e3rl.equations import policy
from e3rl.objectives import _common as common
from e3rl.objectives.base import Loss, TrainBatch
from e3rl.objectives.metrics import measured
from e3rl.settings import setting


@dataclass(frozen=True)
class CISPO(common.GroupNormalised):
    """Clipped importance-sampling policy optimisation (MiniMax-M1, arXiv 2506.13585)."""

    kl_coef: float = setting(0.0, "weight of the KL term; 0 needs no reference policy", source="MiniMax-M1", min=0)
    ratio_cap: float = setting(5.0, "a ratio above it weighs as much as it", source="ScaleRL", above=0)
    advantage_eps: float = setting(1e-4, "added to the standard deviation of the rewards", source="TRL", above=0)

    divides_by = "tokens"

    def loss(self, batch: TrainBatch) -> Loss:
        """Mean over the step's tokens of -min(rho, cap) A log pi, where the weight has no gradient, plus weighted KL."""
        ratios_ST = policy.ratios(common.token_log_ratios(batch)).detach()
        kl_ST = common.kl_terms(batch, self.kl_coef)
        logprobs_ST = batch.logprobs_ST.masked_fill(~batch.mask_ST, 0.0)
        weighted_ST = ratios_ST.clamp(max=self.ratio_cap) * batch.advantages_ST * logprobs_ST
        objective_ST = policy.penalized(weighted_ST, kl_ST, self.kl_coef)
        capped_ST = ratios_ST > self.ratio_cap
        return Loss(
            -common.token_mean(objective_ST, batch),
            measured(batch.mask_ST, {"capped": capped_ST, "ratio": ratios_ST, "kl": kl_ST}),
        )
