"""The clipped surrogate of GRPO's family, with ratios of tokens or of sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from e3rl.equations import policy
from e3rl.objectives import _common as common
from e3rl.objectives.base import Loss, TrainBatch, TrajectoriesOnly
from e3rl.objectives.metrics import measured
from e3rl.settings import setting

Mean = Callable[[Tensor, TrainBatch], Tensor]


@dataclass(frozen=True)
class TokenRatios(TrajectoriesOnly):
    """Base for objectives that clip the ratio of each token: their options and their loss, given what it is averaged over."""

    kl_coef: float = setting(0.0, "weight of the KL term; 0 needs no reference policy", min=0)
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low", min=0, max=1)
    clip_high: float = setting(0.2, "the ratio is clipped above 1 + clip_high", min=0)
    ratio_cap: float = setting(
        0.0, "a ratio above it weighs as much as it where the advantage is negative (dual clip); 0: no cap",
        source="INTELLECT-2", min=0,
    )  # fmt: skip
    kl_ratio: bool = setting(False, "multiply the KL term by the ratio", source="DeepSeek-V3.2")

    def clipped(self, batch: TrainBatch, mean: Mean) -> Loss:
        """Minus the ``mean`` of every token's clipped surrogate less its weighted KL."""
        return clipped_token_loss(
            batch,
            mean,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            kl_coef=self.kl_coef,
            ratio_cap=self.ratio_cap,
            kl_ratio=self.kl_ratio,
        )


def clipped_token_loss(
    batch: TrainBatch,
    mean: Mean,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    ratio_cap: float = 0.0,
    kl_ratio: bool = False,
) -> Loss:
    """Minus the ``mean`` of every token's clipped surrogate less its weighted KL."""
    ratios_ST = policy.ratios(common.token_log_ratios(batch))
    kl_ST = common.kl_terms(batch, kl_coef)
    weighted_ST = kl_ST * ratios_ST if kl_ratio else kl_ST
    held_ST = ratios_ST.clamp(max=ratio_cap) if ratio_cap else ratios_ST
    surrogate_ST = policy.clipped_surrogate(held_ST, batch.advantages_ST, clip_low, clip_high)
    value = -mean(policy.penalized(surrogate_ST, weighted_ST, kl_coef), batch)
    return Loss(value, _metrics(batch, ratios_ST, kl_ST, clip_low, clip_high))


def clipped_sequence_loss(
    batch: TrainBatch, log_ratios_S: Tensor, mean: Mean, *, clip_low: float, clip_high: float, kl_coef: float
) -> Loss:
    """The same with one ratio for all tokens of a sequence."""
    ratios_S1, kl_ST = policy.ratios(log_ratios_S)[:, None], common.kl_terms(batch, kl_coef)
    surrogate_ST = policy.clipped_surrogate(ratios_S1, batch.advantages_ST, clip_low, clip_high)
    value = -mean(policy.penalized(surrogate_ST, kl_ST, kl_coef), batch)
    return Loss(value, _metrics(batch, ratios_S1, kl_ST, clip_low, clip_high))


def _metrics(
    batch: TrainBatch, ratios_ST: Tensor, kl_ST: Tensor, clip_low: float, clip_high: float
) -> dict[str, tuple[float, float]]:
    """``ratios_ST``: [S, T] or [S, 1]."""
    advantages_ST = batch.advantages_ST
    clipped_ST = policy.clipped(ratios_ST, advantages_ST, clip_low, clip_high)
    sides = {"clip_low": clipped_ST & (advantages_ST < 0), "clip_high": clipped_ST & (advantages_ST > 0)}
    return measured(batch.mask_ST, {"clip_fraction": clipped_ST, **sides, "ratio": ratios_ST, "kl": kl_ST})
