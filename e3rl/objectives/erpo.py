"""ERPO: GRPO whose advantage is reshaped token by token, by entropy and by progress over the reference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from e3rl.equations import erpo
from e3rl.objectives import _clipped
from e3rl.objectives import _common as common
from e3rl.objectives.base import GroupSignals, Loss, Need, TrainBatch, TrajectoriesOnly
from e3rl.settings import PAPER, setting


@dataclass(frozen=True)
class ERPO(TrajectoriesOnly):
    """Entropy-regulated policy optimisation (ERPO paper, eq 6-10). The paper states none of its constants."""

    kl_coef: float = setting(0.04, "beta, weight of the KL term", source=PAPER, min=0)
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low", source="TRL", min=0, max=1)
    clip_high: float = setting(0.2, "the ratio is clipped above 1 + clip_high", source="TRL", min=0)
    gamma: float = setting(1.0, "slope of the entropy gate (eq 8)", min=0)
    buckets: int = setting(10, "K, stages that a response is divided into (eq 9)", min=1)
    beta_progress: float = setting(1.0, "scale of the progress signal (eq 7); eq 9 divides it out again", above=0)
    sigma_target: float = setting(1.0, "spread of the progress term (eq 10)", min=0)
    eta: float = setting(0.1, "weight of the progress term against the group advantage (eq 10)", min=0)
    advantage_eps: float = setting(1e-4, "delta, added to every standard deviation", source="TRL", above=0)

    divides_by = "tokens"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference"})

    def advantages(self, signals: GroupSignals) -> Tensor:
        """All statistics are those of this group; nothing is carried from one step to the next."""
        if signals.reference_logprobs_GT is None:
            raise ValueError("ERPO's progress signal needs reference log-probabilities")
        mask_GT, eps = signals.mask_GT, self.advantage_eps
        advantages_G = erpo.group_advantages(signals.rewards_G, eps)
        signal_GT = erpo.progress_signal(signals.old_logprobs_GT, signals.reference_logprobs_GT, self.beta_progress)
        buckets_GT = erpo.progress_buckets(mask_GT, self.buckets)
        relative_GT = erpo.bucket_normalized(signal_GT, buckets_GT, self.buckets, eps)
        gate_GT = erpo.entropy_gate(signals.entropies_GT, mask_GT, self.gamma, eps)
        psi_GT = erpo.calibrated_progress(gate_GT, advantages_G, relative_GT, mask_GT, self.sigma_target, eps)
        return erpo.synthesized_advantages(advantages_G, psi_GT, mask_GT, self.eta, eps)

    def loss(self, batch: TrainBatch) -> Loss:
        """GRPO's loss with these advantages."""
        return _clipped.clipped_token_loss(
            batch, common.token_mean, clip_low=self.clip_low, clip_high=self.clip_high, kl_coef=self.kl_coef
        )
