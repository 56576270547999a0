"""Sums of many bfloat16 gradients keep the precision of float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from e3rl.config import TrainConfig
from e3rl.train import scoring
from e3rl.train.optimizer import GradientSums, MasterOptimizer
from e3rl.train.scoring import head_scores

MICRO_BATCHES = 512


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def test_many_micro_batches_add_up_in_float32():
    """What autograd adds up by itself is several percent off, here as in a run; `GradientSums` is not."""
    generator = torch.Generator().manual_seed(0)
    model, naive = (nn.Linear(64, 32, bias=False, dtype=torch.bfloat16) for _ in range(2))
    naive.load_state_dict(model.state_dict())
    sums, exact = GradientSums(model.parameters()), torch.zeros(32, 64, dtype=torch.float64)
    for _ in range(MICRO_BATCHES):
        inputs = torch.randn(8, 64, generator=generator).bfloat16()
        for one in (model, naive):
            (one(inputs).float() ** 2).mean().backward()
        (alone,) = torch.autograd.grad((naive(inputs).float() ** 2).mean(), [naive.weight])
        exact += alone.double()
    assert model.weight.grad is None
    found = sums.take(model.weight)
    assert found is not None
    assert _relative(found, exact) < 1e-5
    assert _relative(naive.weight.grad, exact) > 0.01
    assert sums.take(model.weight) is None


def test_the_optimizer_steps_with_the_exact_sum():
    """A gradient of 1 and 300 of 1/512: bfloat16 would stay at 1."""
    weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    optimizer = MasterOptimizer([("w", weight)], TrainConfig(max_grad_norm=1e9))
    for gradient in (1.0, *[1 / 512] * 300):
        (weight * gradient).sum().backward()
    assert optimizer.step(0.1) == pytest.approx(1 + 300 / 512, rel=1e-6)
    assert optimizer.step(0.1) == 0.0


def test_the_output_matrix_s_gradient_adds_up_its_chunks_in_float32(monkeypatch: pytest.MonkeyPatch):
    """2,048 tokens in chunks of 16 against one float64 product."""
    monkeypatch.setattr(scoring, "_CHUNK_ELEMENTS", 1)
    generator = torch.Generator().manual_seed(1)
    head = nn.Linear(32, 48, bias=False).bfloat16()
    hidden, ids = torch.randn(2048, 32, generator=generator).bfloat16(), torch.randint(48, (2048,), generator=generator)
    logprobs, _ = head_scores(head, hidden, ids, 1.0)
    logprobs.sum().backward()
    exact = head.weight.detach().double().requires_grad_()
    scores = (hidden.double() @ exact.T).log_softmax(-1)
    scores.gather(-1, ids[:, None]).sum().backward()
    assert head.weight.grad is not None
    assert exact.grad is not None
    assert _relative(head.weight.grad, exact.grad) < 3e-3
