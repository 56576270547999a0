"""DisCO: raise the scores of right answers above those of wrong ones, within a trust region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from e3rl.equations import policy
from e3rl.objectives import _common as common
from e3rl.objectives.base import GroupSignals, Loss, Need, TrainBatch, TrajectoriesOnly
from e3rl.objectives.metrics import measured
from e3rl.settings import setting


@dataclass(frozen=True)
class DisCO(TrajectoriesOnly):
    """Discriminative constrained optimisation (arXiv 2505.12366), with the partial-AUC weighting of wrong answers."""

    score: Literal["log_likelihood", "likelihood_ratio"] = setting(
        "log_likelihood", "score of a response: mean token log-probability, or mean token ratio", source="DisCO paper"
    )
    tau: float = setting(10.0, "smaller: likelier wrong answers weigh more", source="DisCO paper", above=0)
    kl_limit: float = setting(1e-4, "delta, KL to the old policy without a penalty", source="DisCO paper", min=0)
    kl_weight: float = setting(1e3, "beta, weight of the squared excess over kl_limit", source="DisCO paper", min=0)

    needs = frozenset[Need]()

    def advantages(self, signals: GroupSignals) -> Tensor:
        """1/n+ for right answers (reward above 0), minus the softmax of score/tau among wrong ones; 0 without both."""
        right_G = signals.rewards_G > 0
        if bool(right_G.all()) or not bool(right_G.any()):
            return torch.zeros_like(signals.old_logprobs_GT)
        scores_G = self._scores(signals.old_logprobs_GT, signals.old_logprobs_GT, signals.mask_GT)
        wrong_G = (scores_G / self.tau).masked_fill(right_G, -torch.inf).softmax(0)
        return common.on_tokens(torch.where(right_G, 1 / int(right_G.sum()), -wrong_G), signals.mask_GT)

    def _scores(self, logprobs_ST: Tensor, old_logprobs_ST: Tensor, mask_ST: Tensor) -> Tensor:
        values_ST = logprobs_ST
        if self.score == "likelihood_ratio":
            values_ST = policy.ratios(logprobs_ST - old_logprobs_ST)
        return policy.sequence_logprobs(values_ST, mask_ST) / mask_ST.sum(-1).clamp(min=1)

    def loss(self, batch: TrainBatch) -> Loss:
        """Minus the groups' mean of sum_i A_i score_i, plus a squared hinge on each response's KL to the old policy."""
        mask_ST, old_ST = batch.mask_ST, batch.old_logprobs_ST
        advantages_S = batch.advantages_ST.where(mask_ST, 0.0).sum(-1) / common.lengths(batch)
        scores_S = self._scores(batch.logprobs_ST, old_ST, mask_ST)
        kl_ST = policy.k3_kl(old_ST.where(mask_ST, 0.0), batch.logprobs_ST.where(mask_ST, 0.0))
        excess_S = (kl_ST.sum(-1) / common.lengths(batch) - self.kl_limit).clamp(min=0)
        penalty = 0.5 * self.kl_weight * excess_S.square().sum() / batch.totals.sequences
        value = penalty - (advantages_S * scores_S).sum() / batch.totals.groups
        present_S = mask_ST.any(-1)
        measures = measured(present_S, {"score": scores_S, "over_kl_limit": excess_S > 0})
        return Loss(value, measures | measured(mask_ST, {"kl_old": kl_ST}))
