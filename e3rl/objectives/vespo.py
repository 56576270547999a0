"""VESPO: a smooth weight of the response's ratio in place of a clip."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from e3rl.equations import policy
from e3rl.objectives import _common as common
from e3rl.objectives.base import Loss, TrainBatch
from e3rl.objectives.metrics import measured
from e3rl.settings import setting

LEAST_RATIO = 1e-8
"""A response's ratio is held above it, as in the authors' code."""


@dataclass(frozen=True)
class VESPO(common.GroupNormalised):
    """Variational sequence-level soft policy optimisation (arXiv 2602.10693)."""

    kl_coef: float = setting(0.0, "weight of the KL term; 0 needs no reference policy", source="TRL", min=0)
    k_positive: float = setting(
        2.0, "k where the advantage is 0 or above: the weight falls with w^k", source="TRL", min=0
    )
    lambda_positive: float = setting(3.0, "lambda there: the weight falls with e^(-lambda w)", source="TRL", above=0)
    k_negative: float = setting(3.0, "k where the advantage is below 0", source="TRL", min=0)
    lambda_negative: float = setting(2.0, "lambda where the advantage is below 0", source="TRL", above=0)
    advantage_eps: float = setting(1e-4, "added to the standard deviation of the rewards", source="TRL", above=0)

    divides_by = "tokens"

    def loss(self, batch: TrainBatch) -> Loss:
        """Mean over the step's tokens of -phi(w) A log pi, where phi has no gradient, plus weighted KL.

        w is the ratio of the whole response, and phi(w) = w^k e^(lambda (1 - w)), which is 1 at w = 1.
        """
        most = policy.MAX_LOG_RATIO
        log_ratios_ST = common.token_log_ratios(batch).detach().clamp(-most, most)
        log_w_S1 = log_ratios_ST.sum(-1, keepdim=True).clamp(math.log(LEAST_RATIO), most)
        positive_ST = batch.advantages_ST >= 0
        k_ST = torch.where(positive_ST, self.k_positive, self.k_negative)
        lambda_ST = torch.where(positive_ST, self.lambda_positive, self.lambda_negative)
        phi_ST = (k_ST * log_w_S1 + lambda_ST * (1 - log_w_S1.exp())).exp()
        kl_ST = common.kl_terms(batch, self.kl_coef)
        weighted_ST = phi_ST * batch.advantages_ST * batch.logprobs_ST.masked_fill(~batch.mask_ST, 0.0)
        return Loss(
            -common.token_mean(policy.penalized(weighted_ST, kl_ST, self.kl_coef), batch),
            measured(batch.mask_ST, {"gamma_weight": phi_ST, "ratio": log_w_S1.exp(), "kl": kl_ST}),
        )
