"""Importance weights from the engine that generated to the trainer that learns: their probabilities are never quite equal.

A weight multiplies the *gradient* of a token's log-probability, not an advantage: a loss L(log pi_1, ..., log pi_T) reaches
the weights of the model through nothing else, so every objective's terms are weighed, its KL term among them, while clip
decisions and the reported loss stay as they are. No objective has to know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImportanceWeights:
    """A sequence's weights, and where the cap changed them."""

    weights_T: Tensor
    limited_T: Tensor  # bool


def importance_weights(
    trainer_logprobs_T: Tensor, engine_logprobs_T: Tensor, mask_T: Tensor, correction: str, cap: float
) -> ImportanceWeights:
    """pi_trainer / pi_engine of each token, or of the whole sequence on each of its tokens, kept within ``cap``.

    ``correction`` is 'token_' or 'sequence_' and then 'truncate' (a larger weight becomes ``cap``) or 'mask' (it becomes
    0). Outside ``mask_T`` weights are 0 and nothing counts: a sequence's ratio is over the tokens that the loss is about.
    """
    level, _, action = correction.partition("_")
    log_ratios_T = (trainer_logprobs_T - engine_logprobs_T).double().where(mask_T, 0.0)
    if level == "sequence":
        log_ratios_T = log_ratios_T.sum().expand_as(log_ratios_T)
    ratios_T = log_ratios_T.exp()
    limited_T = (ratios_T > cap) & mask_T
    weights_T = torch.where(limited_T, cap if action == "truncate" else 0.0, ratios_T).where(mask_T, 0.0)
    return ImportanceWeights(weights_T.to(trainer_logprobs_T.dtype), limited_T)


def weigh_gradient(logprobs_ST: Tensor, weights_ST: Tensor) -> Tensor:
    """The same log-probabilities, their gradient multiplied by the weights."""
    return logprobs_ST.detach() + weights_ST * (logprobs_ST - logprobs_ST.detach())
