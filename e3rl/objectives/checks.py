"""Checks the contract of objectives on a toy group before training; the error names the broken clause."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import torch
from torch import Tensor

from e3rl.errors import UserError
from e3rl.objectives.base import GroupSignals, Loss, Need, Objective, Totals, TrainBatch

_METHODS = ("advantages", "erased_advantage", "loss")
_COUNTS = ("groups", "sequences", "tokens")


def broken(name: str, clause: str) -> UserError:
    """The error that names the objective and the clause of the contract that it breaks."""
    return UserError(f"objective '{name}' breaks its contract: {clause}. See docs/objectives.md, 'Your own objective'.")


def check_class(name: str, kind: Any) -> None:
    """A frozen dataclass with the three methods and ``needs``."""
    if not isinstance(kind, type):
        raise broken(name, f"it must be a class, and is a {type(kind).__name__}")
    if not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise broken(name, f"{kind.__name__} must be a frozen dataclass: put @dataclass(frozen=True) above it")
    for method in _METHODS:
        if not callable(getattr(kind, method, None)):
            raise broken(name, f"{kind.__name__} has no method `{method}`")
    if not hasattr(kind, "needs"):
        raise broken(name, f"{kind.__name__} has no `needs`; write needs = frozenset() where nothing is needed")


def toy_signals(needs: frozenset[Need], siblings: int = 3) -> GroupSignals:
    """A group of responses of 5, 4, 3, ... tokens in segments of 2, with mixed rewards and what ``needs`` asks for."""
    generator = torch.Generator().manual_seed(0)
    positions_T = torch.arange(5)
    mask_GT = positions_T < torch.tensor([max(5 - g, 1) for g in range(siblings)])[:, None]
    logprobs_GT, reference_GT = -torch.rand(2, siblings, 5, generator=generator).where(mask_GT, 0.0)
    shares_GT = torch.rand(siblings, 5, generator=generator).where(mask_GT, 0.0)
    return GroupSignals(
        rewards_G=torch.tensor([1.0, 0.0, 0.5, 0.0][:siblings], dtype=torch.float64),
        mask_GT=mask_GT,
        segments_GT=(positions_T // 2).expand_as(mask_GT).where(mask_GT, -1),
        entropies_GT=-logprobs_GT,
        old_logprobs_GT=logprobs_GT,
        reference_logprobs_GT=reference_GT if "reference" in needs else None,
        shares_GT=shares_GT / shares_GT.sum(-1, keepdim=True) if "shares" in needs else None,
        uncertainties_GT=(positions_T // 2 / 2).where(mask_GT, -1.0) if "uncertainties" in needs else None,
    )


def toy_batch(signals: GroupSignals, advantages_GT: Tensor, drift: float = 0.0) -> TrainBatch:
    """The group as one micro-batch; ``drift`` moves the policy away from the one that made the rollout."""
    siblings, length = signals.mask_GT.shape
    moves_GT = torch.linspace(-drift, drift, siblings * length, dtype=signals.old_logprobs_GT.dtype)
    logprobs_GT = signals.old_logprobs_GT + moves_GT.view(siblings, length)
    return TrainBatch(
        logprobs_ST=logprobs_GT.requires_grad_(),
        old_logprobs_ST=signals.old_logprobs_GT,
        reference_logprobs_ST=signals.reference_logprobs_GT,
        advantages_ST=advantages_GT.to(logprobs_GT.dtype),
        mask_ST=signals.mask_GT,
        segments_ST=signals.segments_GT,
        group_sizes_S=torch.full((siblings,), siblings),
        erased_S=torch.zeros(siblings, dtype=torch.bool),
        totals=Totals(groups=1, sequences=siblings, tokens=int(signals.mask_GT.sum()), completion_limit=length),
    )


def check_needs(name: str, objective: Objective) -> None:
    """Known needs, and the options that "shares" is read with."""
    needs, known = objective.needs, get_args(Need)
    if not isinstance(needs, frozenset) or not needs <= set(known):
        raise broken(name, f"`needs` is {needs!r}, and must be a frozenset of {', '.join(map(repr, known))}")
    for option in ("attribution_window", "attribution_layers") if "shares" in needs else ():
        if not hasattr(objective, option):
            raise broken(name, f"it needs 'shares' and has no option `{option}`")
    if {"rewards_only", "shares"} <= needs:
        raise broken(name, "'rewards_only' says that advantages are made without shares, which it needs")


def check_rewards_only(name: str, objective: Objective, signals: GroupSignals) -> None:
    """Check that "rewards_only" advantages don't change with log-probabilities or entropies."""
    if "rewards_only" not in objective.needs:
        return
    names = ("entropies_GT", "old_logprobs_GT", "reference_logprobs_GT")
    others = {key: value * 2 - 1 for key in names if (value := getattr(signals, key)) is not None}
    if not torch.equal(objective.advantages(signals), objective.advantages(dataclasses.replace(signals, **others))):
        raise broken(name, "`needs` has 'rewards_only', but `advantages` depends on log-probabilities or entropies")


def check_advantages(name: str, advantages_GT: Any, signals: GroupSignals) -> Tensor:
    """``advantages_GT`` itself where it is one finite number per token, 0 in padding."""
    got = tuple(advantages_GT.shape) if isinstance(advantages_GT, Tensor) else type(advantages_GT).__name__
    if got != (wanted := tuple(signals.mask_GT.shape)):
        raise broken(name, f"`advantages` returned {got}, not one number per token {wanted}")
    if not bool(torch.isfinite(advantages_GT).all()):
        raise broken(name, f"`advantages` has NaN or infinite values for rewards {signals.rewards_G.tolist()}")
    if bool((advantages_GT[~signals.mask_GT] != 0).any()):
        raise broken(name, "`advantages` must be 0 in padding")
    return advantages_GT


def check_divides_by(name: str, objective: Objective, batch: TrainBatch) -> None:
    """A loss that is said to be divided by one count of the step is: of twice that count it is half, of others the same."""
    said: Any = getattr(objective, "divides_by", None)
    if said not in (None, *_COUNTS):
        raise broken(name, f"`divides_by` is {said!r}, and must be one of {', '.join(map(repr, _COUNTS))}")
    for count in _COUNTS if said else ():
        twice = dataclasses.replace(batch.totals, **{count: 2 * getattr(batch.totals, count)})
        losses = [objective.loss(dataclasses.replace(batch, totals=totals)).value for totals in (batch.totals, twice)]
        one, other = (torch.autograd.grad(loss, batch.logprobs_ST)[0] for loss in losses)
        if not torch.allclose(other, one / 2 if count == said else one, rtol=1e-4, atol=1e-7):
            raise broken(
                name, f"`divides_by` is {said!r}, but twice the step's {count} give another gradient than that says"
            )


def check_loss(name: str, loss: Any) -> Loss:
    """``loss`` itself where it is a finite scalar with a gradient, and metrics as pairs."""
    if not isinstance(loss, Loss):
        raise broken(name, f"`loss` must return a Loss, and returned a {type(loss).__name__}")
    if loss.value.ndim != 0 or not bool(torch.isfinite(loss.value)):
        raise broken(name, f"`loss` must be one finite number, and is {loss.value.detach()}")
    if not loss.value.requires_grad:
        raise broken(name, "`loss` does not depend on batch.logprobs_ST")
    if pairs := [v for v in loss.metrics.values() if not (isinstance(v, tuple) and len(v) == 2)]:
        raise broken(name, f"metrics must be (sum, count) pairs; got {pairs[0]!r}")
    return loss


def check_objective_runs(name: str, objective: Objective) -> None:
    """Needs, advantages and loss on a toy group."""
    check_needs(name, objective)
    signals = toy_signals(objective.needs)
    try:
        advantages_GT = check_advantages(name, objective.advantages(signals), signals)
        check_rewards_only(name, objective, signals)
        check_loss(name, objective.loss(toy_batch(signals, advantages_GT)))
        check_divides_by(name, objective, toy_batch(signals, advantages_GT, drift=0.1))
        erased = objective.erased_advantage(1.0)
    except UserError:
        raise
    except Exception as error:  # a plug-in objective may raise anything
        raise broken(name, f"it failed on a toy group with {type(error).__name__}: {error}") from error
    if not isinstance(erased, float | int):
        raise broken(name, f"`erased_advantage` must return a number, and returned {erased!r}")
