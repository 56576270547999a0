"""The contract of an objective, as a test that its author can import and run.

from e3rl.testing.objective import check_objective

def test_contract():
    check_objective(MyObjective())
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from e3rl.objectives.base import GroupSignals, Objective, TrainBatch
from e3rl.objectives.checks import (
    broken,
    check_advantages,
    check_class,
    check_loss,
    check_objective_runs,
    toy_batch,
    toy_signals,
)

_TOLERANCE = 1e-6


def check_objective(objective: Objective, *, additive: bool = True) -> None:
    """Raises UserError, naming the broken clause, unless ``objective`` keeps the whole contract.

    ``additive=False`` is for objectives that look at a whole micro-batch, whose loss therefore depends on how a step is
    divided; say so in your documentation.
    """
    name = type(objective).__name__
    check_class(name, type(objective))
    check_objective_runs(name, objective)
    for signals in _groups(objective):
        check_advantages(name, objective.advantages(signals), signals)
    check_purity(name, objective)
    check_padding(name, objective)
    check_finite_gradients(name, objective)
    if additive:
        check_additivity(name, objective)


def _groups(objective: Objective) -> Iterator[GroupSignals]:
    """Mixed rewards, equal rewards of either kind, a single sibling."""
    mixed = _double(toy_signals(objective.needs))
    yield mixed
    yield dataclasses.replace(mixed, rewards_G=torch.zeros_like(mixed.rewards_G))
    yield dataclasses.replace(mixed, rewards_G=torch.ones_like(mixed.rewards_G))
    yield _double(toy_signals(objective.needs, siblings=1))


def _double(signals: GroupSignals) -> GroupSignals:
    return dataclasses.replace(signals, **{k: v.double() for k, v in _tensors(signals) if v.is_floating_point()})


def _tensors(values: GroupSignals | TrainBatch) -> list[tuple[str, Tensor]]:
    pairs = [(f.name, getattr(values, f.name)) for f in dataclasses.fields(values)]
    return [(name, value) for name, value in pairs if isinstance(value, Tensor)]


def _mixed_batch(objective: Objective, drift: float) -> tuple[GroupSignals, TrainBatch]:
    signals = _double(toy_signals(objective.needs))
    return signals, toy_batch(signals, objective.advantages(signals), drift)


def _loss_and_gradient(objective: Objective, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    logprobs_ST = batch.logprobs_ST.detach().clone().requires_grad_()
    value = objective.loss(dataclasses.replace(batch, logprobs_ST=logprobs_ST)).value
    (gradient_ST,) = torch.autograd.grad(value, logprobs_ST)
    return value.detach(), gradient_ST


def check_purity(name: str, objective: Objective) -> None:
    """The same input gives the same output twice, and is not changed."""
    signals = _double(toy_signals(objective.needs))
    untouched = {name: value.clone() for name, value in _tensors(signals)}
    first, second = objective.advantages(signals), objective.advantages(signals)
    batch = toy_batch(signals, first, drift=0.3)
    untouched |= {name: value.detach().clone() for name, value in _tensors(batch)}
    loss, again = objective.loss(batch), objective.loss(batch)
    if not all(torch.equal(value, untouched[key]) for key, value in _tensors(signals) + _tensors(batch)):
        raise broken(name, "it changed its input in place")
    if not torch.equal(first, second) or not torch.equal(loss.value, again.value):
        raise broken(name, "the same input gave two different results; keep no state and draw no random numbers")


def check_padding(name: str, objective: Objective) -> None:
    """More padding, with arbitrary values, changes neither advantages nor loss nor gradients."""
    signals, batch = _mixed_batch(objective, drift=0.3)
    advantages_GT = objective.advantages(signals)
    wider_GT = objective.advantages(dataclasses.replace(signals, **_padded(signals)))
    if not torch.allclose(wider_GT[:, : advantages_GT.shape[1]], advantages_GT, atol=_TOLERANCE):
        raise broken(name, "`advantages` depends on the values in the padding")
    value, gradient_ST = _loss_and_gradient(objective, batch)
    wide_value, wide_ST = _loss_and_gradient(objective, dataclasses.replace(batch, **_padded(batch)))
    if not torch.allclose(wide_value, value, atol=_TOLERANCE):
        raise broken(name, "`loss` depends on the values in the padding; use batch.mask_ST")
    if not torch.allclose(wide_ST[:, : gradient_ST.shape[1]], gradient_ST, atol=_TOLERANCE):
        raise broken(name, "the gradient depends on the values in the padding; use batch.mask_ST")
    if bool((gradient_ST[~batch.mask_ST] != 0).any()) or bool((wide_ST[:, gradient_ST.shape[1] :] != 0).any()):
        raise broken(name, "`loss` has a gradient in the padding; use batch.mask_ST")


def _padded(values: GroupSignals | TrainBatch) -> dict[str, Any]:
    """Every per-token tensor with arbitrary values in its padding and in three more columns."""
    mask = values.mask_GT if isinstance(values, GroupSignals) else values.mask_ST
    fill: dict[str, float | bool] = {"mask_GT": False, "mask_ST": False, "segments_GT": -1, "segments_ST": -1}
    fill |= {"advantages_ST": 0.0, "shares_GT": 0.0}
    wide = {}
    for key, value in _tensors(values):
        if value.ndim == 2:
            filler = fill.get(key, -7.0)
            rubbish = torch.full_like(value, filler, requires_grad=False)
            wide[key] = torch.cat([torch.where(mask, value.detach(), rubbish), rubbish[:, :3]], 1)
    return wide


def check_finite_gradients(name: str, objective: Objective) -> None:
    """A policy that has drifted far from the one that made the rollout still gives finite numbers."""
    for drift in (0.0, 1.0, 50.0):
        _, batch = _mixed_batch(objective, drift)
        check_loss(name, objective.loss(batch))
        if not bool(torch.isfinite(_loss_and_gradient(objective, batch)[1]).all()):
            raise broken(name, f"the gradient is not finite where log-ratios reach {drift:g}")


def check_additivity(name: str, objective: Objective) -> None:
    """However a batch is divided into micro-batches, losses and gradients add up to those of the whole."""
    _, batch = _mixed_batch(objective, drift=0.3)
    value, gradient_ST = _loss_and_gradient(objective, batch)
    for parts in ([[0], [1], [2]], [[2, 0], [1]]):
        pieces = [_loss_and_gradient(objective, rows(batch, part)) for part in parts]
        order = torch.tensor([row for part in parts for row in part])
        together_ST = torch.cat([piece[1] for piece in pieces])
        if not torch.allclose(torch.stack([piece[0] for piece in pieces]).sum(), value, atol=_TOLERANCE):
            raise broken(name, "micro-batch losses don't add up to the batch's loss; divide by batch.totals")
        if not torch.allclose(together_ST, gradient_ST[order], atol=_TOLERANCE):
            raise broken(name, "micro-batch gradients differ from the batch's; divide by batch.totals")


def rows(batch: TrainBatch, chosen: list[int]) -> TrainBatch:
    """Some sequences of a batch as a micro-batch of the same step."""
    kept: dict[str, Any] = {name: value.detach()[chosen] for name, value in _tensors(batch)}
    return dataclasses.replace(batch, **kept)
