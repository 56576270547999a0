"""Every tensor equation in single and double precision, on every device at hand, against float64 on the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from e3rl.equations import advantage, attribution, policy, threshold, tokens, uncertainty

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
WEIGHTS = {"base_weight": 1.0, "gradient_weight": 0.5, "extremum_weight": 0.1, "perturbation_weight": 0.2}
SEGMENTS = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 1, -1, -1], [0, -1, -1, -1, -1]])

SIZES = torch.tensor([3, 3, 3])


def scores(x: Tensor) -> Tensor:
    return torch.stack(tokens.token_scores(x.clone(), torch.tensor([4, 0, 2], device=x.device), 0.7))


def gradient(x: Tensor) -> Tensor:
    ids = torch.tensor([4, 0, 2], device=x.device)
    return tokens.logprob_gradient(x.clone(), x.logsumexp(-1) / 0.7, ids, x[:, 0], 0.7)


def u(x: Tensor) -> Tensor:
    return torch.stack(uncertainty.uncertainty_terms(*x[:, :4].T, **WEIGHTS))


CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token_distribution": lambda x, s: tokens.token_distribution(x, 0.7),
    "greedy_logprob": lambda x, s: tokens.greedy_logprob(x),
    "perturbation": lambda x, s: tokens.perturbation(x.amax(-1, keepdim=True), x[:, :1]),
    "token_entropy": lambda x, s: tokens.token_entropy(x.softmax(-1), x.log_softmax(-1)),
    "truncated_entropy": lambda x, s: tokens.truncated_entropy(x.softmax(-1), x.log_softmax(-1), x[:, 0].sigmoid()),
    "rescaled_entropy": lambda x, s: tokens.rescaled_entropy(x, x.amax(-1, keepdim=True), x[:, :1] ** 2, 0 * x),
    "token_scores": lambda x, s: scores(x),
    "logprob_gradient": lambda x, s: gradient(x),
    "sequence_logprobs": lambda x, s: policy.sequence_logprobs(x, s >= 0),
    "sequence_mean_log_ratios": lambda x, s: policy.sequence_mean_log_ratios(x, s >= 0),
    "segment_log_ratios": lambda x, s: policy.segment_log_ratios(x, 0.5 * x, s, 3),
    "segment_mean_log_ratios": lambda x, s: policy.segment_mean_log_ratios(x, 0.5 * x, s, 3),
    "ratios": lambda x, s: policy.ratios(x),
    "clipped_surrogate": lambda x, s: policy.clipped_surrogate(x.exp(), x, **CLIP),
    "k3_kl": lambda x, s: policy.k3_kl(x, 0.5 * x),
    "segment_objective": lambda x, s: policy.segment_objective(x[:, :3], s[:, :3] >= 0, x, 0.1),
    "group_mean": lambda x, s: policy.group_mean(x[:, 0], SIZES.to(x.device), 2),
    "segment_entropy": lambda x, s: uncertainty.segment_entropy(x),
    "segment_perturbation": lambda x, s: uncertainty.segment_perturbation(x),
    "smooth_causal": lambda x, s: uncertainty.smooth_causal(x, 0.5, 2),
    "largest_entropy": lambda x, s: uncertainty.largest_entropy(x),
    "entropy_variation": lambda x, s: uncertainty.entropy_variation(x),
    "extremum_deviation": lambda x, s: uncertainty.extremum_deviation(x[:, 0], 0.3, 0.7),
    "uncertainty_terms": lambda x, s: u(x),
    "group_moments": lambda x, s: torch.stack(threshold.group_moments(x[0])),
    "quantile_baseline": lambda x, s: threshold.quantile_baseline(x[0], 0.3),
    "offset": lambda x, s: threshold.offset(x[0, 0], 1.0, 0.5, 0.1),
    "macro_baseline": lambda x, s: threshold.macro_baseline(x[0, 0], x[0, 1], x[0, 2]),
    "modulation": lambda x, s: threshold.modulation(x, x[1].abs(), 0.1),
    "threshold": lambda x, s: threshold.threshold(0.7, 1.1, x[0]),
    "token_attribution": lambda x, s: attribution.token_attribution(x[None, None], x[None, :, 0]),
    "attention_shares": lambda x, s: attribution.attention_shares(x.abs(), s >= 0),
    "segment_rewards": lambda x, s: attribution.segment_rewards(x[:, 0], x.abs()),
    "segment_advantages": lambda x, s: advantage.segment_advantages(x, 1e-6),
    "sequence_advantages": lambda x, s: advantage.sequence_advantages(x[:, 0], 1e-6),
    "anchored_advantages": lambda x, s: advantage.anchored_advantages(x[:, 0], x[:, :3], (s >= 0).sum(-1)),
}


def sample() -> Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_and_device(name: str, device: str, dtype: torch.dtype) -> None:
    """The result has the inputs' type and device, and single precision agrees with double to five digits."""
    expected = CALLS[name](sample(), SEGMENTS)
    found = CALLS[name](sample().to(device, dtype), SEGMENTS.to(device))
    assert (found.dtype, found.device.type) == (dtype, device)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_the_state_machine_needs_no_torch() -> None:
    """Importing it leaves torch alone, so whatever schedules by it stays light."""
    code = "import sys, e3rl.equations.erasure; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
