"""One token: its distribution, perturbation and entropy, for sampling (`sample`) and training (`head_scores`): eq 1-5, 10.

Shapes: S rows, V vocabulary. Entropies are in nats. Arguments called ``logits_SV`` are overwritten: a vocabulary-sized
tensor is the largest of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_distribution(logits_SV: Tensor, temperature: float | Tensor) -> Tensor:
    """Eq 2. Log-probabilities of the next token: the decoder's logits over the temperature, normalised."""
    return (logits_SV / temperature).log_softmax(-1)


def greedy_logprob(logprobs_SV: Tensor) -> Tensor:
    """Eq 4. Log-probability of the likeliest token, [S, 1]."""
    return logprobs_SV.amax(-1, keepdim=True)


def perturbation(greedy_S1: Tensor, logprobs_S1: Tensor) -> Tensor:
    """Eq 5. log p(greedy) - log p(sampled), at least 0, [S]."""
    return (greedy_S1 - logprobs_S1).squeeze(-1)


def token_entropy(probabilities_SV: Tensor, logprobs_SV: Tensor) -> Tensor:
    """Eq 10; ERPO eq 6. H_t = -sum_v p(v) log p(v). NaN where any logit was not finite."""
    return -(probabilities_SV * logprobs_SV).sum(-1)


def truncated_entropy(kept_SV: Tensor, logprobs_SV: Tensor, mass_S: Tensor) -> Tensor:
    """Eq 10. H_t of the truncated distribution: probabilities ``kept_SV``, 0 for dropped tokens, with sum ``mass_S``."""
    return mass_S.log() - (kept_SV * logprobs_SV).sum(-1) / mass_S


def rescaled_entropy(logprobs_SV: Tensor, greedy_S1: Tensor, ratio_S1: Tensor, scratch_SV: Tensor) -> Tensor:
    """Eq 2, 10. H_t at the temperature divided by ``ratio_S1``: log Z minus the mean logit, the largest logit being 0."""
    scaled_SV = torch.sub(logprobs_SV, greedy_S1, out=scratch_SV).mul_(ratio_S1)
    weights_SV = scaled_SV.exp()
    total_S = weights_SV.sum(-1)
    return total_S.log() - weights_SV.mul_(scaled_SV).sum(-1) / total_S


def token_scores(logits_SV: Tensor, ids_S: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eq 1-2, 10. log p of each id, H_t, and log Z of the tempered logits, which `logprob_gradient` needs."""
    shifted_SV = logits_SV.div_(temperature)
    peak_S1 = shifted_SV.amax(-1, keepdim=True)
    shifted_SV -= peak_S1
    logits_S = shifted_SV.gather(-1, ids_S[:, None]).squeeze(-1)
    weights_SV = shifted_SV.exp()
    z_S = weights_SV.sum(-1)
    mean_S = torch.bmm(weights_SV.unsqueeze(1), shifted_SV.unsqueeze(2)).flatten() / z_S
    log_z_S = z_S.log()
    return logits_S - log_z_S, log_z_S - mean_S, log_z_S + peak_S1.squeeze(-1)


def logprob_gradient(
    logits_SV: Tensor, log_z_S: Tensor, ids_S: Tensor, gradient_S: Tensor, temperature: float
) -> Tensor:
    """Eq 1-2. From d loss / d log p(id) to d loss / d logits: (onehot(id) - p) / temperature of it. Overwrites ``logits_SV``."""
    scaled_S = gradient_S / temperature
    slope_SV = logits_SV.div_(temperature).sub_(log_z_S[:, None]).exp_().mul_(-scaled_S[:, None])
    return slope_SV.scatter_add_(-1, ids_S[:, None], scaled_S[:, None])
