"""Vanilla: the model as it is. Rollouts, rewards and evaluation run; nothing is learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from e3rl.objectives.base import GroupSignals, Loss, Need, TrainBatch, TrajectoriesOnly


@dataclass(frozen=True)
class Vanilla(TrajectoriesOnly):
    """No training: the weights are frozen, so no optimizer, schedule or weight decay can change them."""

    needs = frozenset[Need]({"frozen"})

    def advantages(self, signals: GroupSignals) -> Tensor:
        """0 everywhere."""
        return torch.zeros_like(signals.old_logprobs_GT)

    def loss(self, batch: TrainBatch) -> Loss:
        """0, still connected to the model."""
        return Loss(0 * batch.logprobs_ST.where(batch.mask_ST, 0.0).sum(), {})
