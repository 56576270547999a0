"""How far gradients that are added up in pieces are from float64, for `benchmarks/scale.py`."""

from __future__ import annotations

import torch
from scale_figure import Figure
from torch import Tensor, nn

from e3rl.train.optimizer import GradientSums
from e3rl.train.scoring import head_scores

MICRO_BATCHES = 512


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def grad_error_512() -> Figure:
    """Relative error, in percent, of 512 accumulated micro-batches of a bfloat16 model against float64 sums."""
    generator = torch.Generator().manual_seed(0)
    ours = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    autograd = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    autograd.load_state_dict(ours.state_dict())
    sums, exact = GradientSums(ours.parameters()), torch.zeros(128, 256, dtype=torch.float64)
    for _ in range(MICRO_BATCHES):
        inputs = torch.randn(8, 256, generator=generator).bfloat16()
        for model in (ours, autograd):
            (model(inputs).float() ** 2).mean().backward()
        (alone,) = torch.autograd.grad((autograd(inputs).float() ** 2).mean(), [autograd.weight])
        exact += alone.double()
    [weight] = ours.parameters()
    found = sums.take(weight)
    assert found is not None
    assert autograd.weight.grad is not None
    errors = {"left to autograd": 100 * _relative(autograd.weight.grad, exact)}
    return Figure(100 * _relative(found, exact), 0.5, errors)


def head_grad_error() -> Figure:
    """Relative error, in percent, of the bfloat16 output matrix's gradient, made chunk by chunk, against float64."""
    generator = torch.Generator().manual_seed(1)
    tokens, width, vocabulary = 4096, 64, 32_000  # 4,096 tokens are many chunks
    head = nn.Linear(width, vocabulary, bias=False).bfloat16()
    hidden = torch.randn(tokens, width, generator=generator).bfloat16()
    ids = torch.randint(vocabulary, (tokens,), generator=generator)
    head_scores(head, hidden, ids, 1.0)[0].sum().backward()
    exact = torch.zeros(vocabulary, width, dtype=torch.float64)
    weight = head.weight.detach().double()
    for part, drawn in zip(hidden.double().split(512), ids.split(512), strict=True):
        error = -(part @ weight.T).softmax(-1)
        error[torch.arange(len(drawn)), drawn] += 1
        exact += error.T @ part
    assert head.weight.grad is not None
    return Figure(100 * _relative(head.weight.grad, exact), 0.3, {"tokens": tokens, "vocabulary": vocabulary})
