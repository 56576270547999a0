"""SFT: negative log-likelihood of responses that are demonstrations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from e3rl.objectives import _common as common
from e3rl.objectives.base import GroupSignals, Loss, Need, TrainBatch, TrajectoriesOnly
from e3rl.objectives.metrics import measured


@dataclass(frozen=True)
class SFT(TrajectoriesOnly):
    """Supervised fine-tuning (ERPO's baseline) on the data's solutions: no rollouts, no rewards."""

    needs = frozenset[Need]({"demonstrations", "rewards_only"})

    def advantages(self, signals: GroupSignals) -> Tensor:
        """1 on every token."""
        return common.on_tokens(torch.ones_like(signals.rewards_G), signals.mask_GT)

    def loss(self, batch: TrainBatch) -> Loss:
        """Minus the mean log-probability of all tokens of the step, weighted by their advantages."""
        loss_ST = -batch.advantages_ST * batch.logprobs_ST
        return Loss(common.token_mean(loss_ST, batch), measured(batch.mask_ST, {"logprob": batch.logprobs_ST}))
