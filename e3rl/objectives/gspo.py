"""GSPO: one ratio per response, the length-th root of the ratio of its probabilities."""

from __future__ import annotations

from dataclasses import dataclass

from e3rl.equations import policy
from e3rl.objectives import _clipped
from e3rl.objectives import _common as common
from e3rl.objectives.base import Loss, TrainBatch
from e3rl.settings import setting


@dataclass(frozen=True)
class GSPO(common.GroupNormalised):
    """Group sequence policy optimisation (arXiv 2507.18071)."""

    kl_coef: float = setting(0.0, "weight of the KL term; 0 needs no reference policy", source="GSPO paper", min=0)
    clip_low: float = setting(3e-4, "the ratio is clipped below 1 - clip_low", source="GSPO paper", min=0, max=1)
    clip_high: float = setting(4e-4, "the ratio is clipped above 1 + clip_high", source="GSPO paper", min=0)
    advantage_eps: float = setting(1e-4, "added to the standard deviation of the rewards", source="TRL", above=0)

    divides_by = "sequences"
    mean = staticmethod(common.sequence_mean)

    def loss(self, batch: TrainBatch) -> Loss:
        """Clipped surrogate of each response's length-normalised ratio, less weighted KL; `mean` over responses."""
        log_ratios_S = policy.sequence_mean_log_ratios(batch.logprobs_ST - batch.old_logprobs_ST, batch.mask_ST)
        return _clipped.clipped_sequence_loss(
            batch,
            log_ratios_S,
            self.mean,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            kl_coef=self.kl_coef,
        )
