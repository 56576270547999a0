"""SAPO: a smooth gate instead of the clip, narrower for tokens with negative advantages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from e3rl.equations import policy
from e3rl.objectives import _common as common
from e3rl.objectives.base import Loss, TrainBatch
from e3rl.objectives.metrics import measured
from e3rl.settings import setting


@dataclass(frozen=True)
class SAPO(common.GroupNormalised):
    """Soft adaptive policy optimisation (arXiv 2511.20347)."""

    kl_coef: float = setting(0.0, "weight of the KL term; 0 needs no reference policy", source="SAPO paper", min=0)
    temperature_positive: float = setting(1.0, "tau where the advantage is above 0", source="SAPO paper", above=0)
    temperature_negative: float = setting(1.05, "tau elsewhere; larger: narrower gate", source="SAPO paper", above=0)
    advantage_eps: float = setting(1e-4, "added to the standard deviation of the rewards", source="TRL", above=0)

    divides_by = "sequences"

    def loss(self, batch: TrainBatch) -> Loss:
        """Mean over responses of the token mean of -(4/tau) sigmoid(tau (rho - 1)) A, plus weighted KL."""
        ratios_ST = policy.ratios(common.token_log_ratios(batch))
        tau_ST = torch.full_like(ratios_ST, self.temperature_negative)
        tau_ST = tau_ST.masked_fill(batch.advantages_ST > 0, self.temperature_positive)
        gate_ST = torch.sigmoid(tau_ST * (ratios_ST - 1))
        kl_ST = common.kl_terms(batch, self.kl_coef)
        objective_ST = policy.penalized(4 / tau_ST * gate_ST * batch.advantages_ST, kl_ST, self.kl_coef)
        weight_ST = 4 * gate_ST * (1 - gate_ST)  # of the token's gradient against an unclipped one; 1 on-policy
        measures = measured(batch.mask_ST, {"gate": weight_ST, "ratio": ratios_ST, "kl": kl_ST})
        return Loss(-common.sequence_mean(objective_ST, batch), measures)
