"""RLOO: REINFORCE whose baseline is the mean reward of the other siblings, with the KL as part of the reward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from e3rl.equations import policy
from e3rl.objectives import _clipped
from e3rl.objectives import _common as common
from e3rl.objectives.base import GroupSignals, Loss, Need, TrainBatch, TrajectoriesOnly
from e3rl.objectives.metrics import measured
from e3rl.settings import setting


@dataclass(frozen=True)
class RLOO(TrajectoriesOnly):
    """REINFORCE leave-one-out (arXiv 2402.14740), with a clipped ratio of whole responses as in TRL."""

    kl_coef: float = setting(0.05, "weight of the KL in the reward; 0 needs no reference policy", source="TRL", min=0)
    clip_low: float = setting(0.2, "the response's ratio is clipped below 1 - clip_low", source="TRL", min=0, max=1)
    clip_high: float = setting(0.2, "the response's ratio is clipped above 1 + clip_high", source="TRL", min=0)

    divides_by = "sequences"

    @property
    def needs(self) -> frozenset[Need]:
        """The reference policy, if its KL has a weight; otherwise the rewards are enough."""
        return common.kl_needs(self.kl_coef) or common.REWARDS_ONLY

    def advantages(self, signals: GroupSignals) -> Tensor:
        """r_i less the mean of the others' r, [G, T], where r = R - kl_coef (log pi_old - log pi_ref) of the response.

        0 in padding, and for a single sibling.
        """
        rewards_G, siblings = signals.rewards_G, len(signals.rewards_G)
        if self.kl_coef > 0:
            if signals.reference_logprobs_GT is None:
                raise ValueError("kl_coef > 0, but the group has no reference log-probabilities")
            differences_GT = signals.old_logprobs_GT - signals.reference_logprobs_GT
            rewards_G = rewards_G - self.kl_coef * policy.sequence_logprobs(differences_GT, signals.mask_GT)
        against_others_G = (rewards_G - rewards_G.mean()) * siblings / max(siblings - 1, 1)
        return common.on_tokens(against_others_G, signals.mask_GT)

    def loss(self, batch: TrainBatch) -> Loss:
        """Clipped surrogate of each response's ratio, mean over responses. The KL is in the advantages."""
        log_ratios_S = policy.sequence_logprobs(batch.logprobs_ST - batch.old_logprobs_ST, batch.mask_ST)
        loss = _clipped.clipped_sequence_loss(
            batch,
            log_ratios_S,
            common.sequence_mean,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            kl_coef=0.0,
        )
        kl = measured(batch.mask_ST, {"kl": common.kl_terms(batch, self.kl_coef)})
        return Loss(loss.value, {**loss.metrics, **kl})
