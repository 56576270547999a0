"""BAPO: clip bounds moved, batch by batch, until enough of the surrogate comes from positive advantages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from e3rl.equations import policy
from e3rl.objectives import _clipped
from e3rl.objectives import _common as common
from e3rl.objectives.base import Loss, TrainBatch
from e3rl.settings import setting


@dataclass(frozen=True)
class BAPO(common.GroupNormalised):
    """Balanced policy optimisation with adaptive clipping (arXiv 2510.18927). Bounds are ratios, not offsets."""

    kl_coef: float = setting(0.0, "weight of the KL term; 0 needs no reference policy", source="BAPO paper", min=0)
    target: float = setting(
        0.5, "rho_0, share of the surrogate due to positive advantages", source="BAPO paper", min=0, max=1
    )
    lowest: float = setting(0.6, "a-, where the lower bound starts", source="BAPO paper", min=0, max=1)
    lowest_limit: float = setting(0.9, "b-, where the lower bound stops", source="BAPO paper", min=0, max=1)
    lowest_step: float = setting(0.02, "delta_2, step of the lower bound", source="BAPO paper", above=0)
    highest: float = setting(1.2, "a+, where the upper bound starts", source="BAPO paper", min=1)
    highest_limit: float = setting(3.0, "b+, where the upper bound stops", source="BAPO paper", min=1)
    highest_step: float = setting(0.05, "delta_1, step of the upper bound", source="BAPO paper", above=0)
    advantage_eps: float = setting(1e-4, "added to the standard deviation of the rewards", source="TRL", above=0)

    def bounds(self) -> list[tuple[float, float]]:
        """The pairs (c_low, c_high) in the order they are tried: first c_high rises to its limit, then c_low."""
        highs = _steps(self.highest, self.highest_limit, self.highest_step)
        lows = _steps(self.lowest, self.lowest_limit, self.lowest_step)
        return [(lows[0], high) for high in highs] + [(low, highs[-1]) for low in lows[1:]]

    def chosen_bounds(self, ratios_ST: Tensor, advantages_ST: Tensor, mask_ST: Tensor) -> tuple[float, float]:
        """The first pair for which positive advantages make up the target share of the surrogate; else the last."""
        ratios, advantages = ratios_ST.detach()[mask_ST], advantages_ST[mask_ST]
        tried = self.bounds()
        parts = [policy.clipped_surrogate(ratios, advantages, 1 - low, high - 1) for low, high in tried]
        shares = torch.stack([p.clamp(min=0).sum() / p.abs().sum().clamp(min=torch.finfo(p.dtype).tiny) for p in parts])
        return next((b for b, share in zip(tried, shares.tolist(), strict=True) if share >= self.target), tried[-1])

    def loss(self, batch: TrainBatch) -> Loss:
        """GRPO's token-mean loss between the chosen bounds."""
        ratios_ST = policy.ratios(common.token_log_ratios(batch))
        low, high = self.chosen_bounds(ratios_ST, batch.advantages_ST, batch.mask_ST)
        loss = _clipped.clipped_token_loss(
            batch, common.token_mean, clip_low=1 - low, clip_high=high - 1, kl_coef=self.kl_coef
        )
        return Loss(loss.value, {**loss.metrics, "bound_low": (low, 1.0), "bound_high": (high, 1.0)})


def _steps(start: float, limit: float, step: float) -> list[float]:
    count = int((limit - start) / step + 1e-9)
    return [start + i * step for i in range(max(count, 0) + 1)]
