"""Ragged toy steps in both shapes: tensors for the library, plain lists for the reference."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from e3rl.config import ObjectiveConfig
from e3rl.objectives import build
from e3rl.objectives.base import GroupSignals, Objective, Totals, TrainBatch

Sequence = dict[str, Any]
LIMIT = 12


def make(name: str, **options: Any) -> Objective:
    return build(ObjectiveConfig(name, options))


def random_group(rng: random.Random, siblings: int, drift: float = 0.4) -> list[Sequence]:
    """Responses of 1 to 12 tokens in segments of 4."""
    group = []
    for _ in range(siblings):
        length = rng.randint(1, LIMIT)
        old = [-rng.random() * 3 for _ in range(length)]
        weights = [rng.random() + 0.05 for _ in range(length)]
        group.append(
            {
                "old": old,
                "logp": [x + rng.uniform(-drift, drift) for x in old],
                "ref": [x + rng.uniform(-drift, drift) for x in old],
                "entropy": [rng.random() * 2 for _ in range(length)],
                "share": [w / sum(weights) for w in weights],
                "segment": [t // 4 for t in range(length)],
                "advantage": [rng.uniform(-2, 2)] * length,
                "group_size": siblings,
            }
        )
    return group


def stacked(group: list[Sequence], key: str, fill: float) -> Tensor:
    width = max(len(s["old"]) for s in group)
    kind = torch.long if key == "segment" else torch.float64
    return torch.tensor([list(s[key]) + [fill] * (width - len(s["old"])) for s in group], dtype=kind)


def mask_of(group: list[Sequence]) -> Tensor:
    return stacked(group, "segment", -1) >= 0


def signals_of(group: list[Sequence], rewards: list[float]) -> GroupSignals:
    return GroupSignals(
        rewards_G=torch.tensor(rewards, dtype=torch.float64),
        mask_GT=mask_of(group),
        segments_GT=stacked(group, "segment", -1),
        entropies_GT=stacked(group, "entropy", 0.0),
        old_logprobs_GT=stacked(group, "old", 0.0),
        reference_logprobs_GT=stacked(group, "ref", 0.0),
        shares_GT=stacked(group, "share", 0.0),
        uncertainties_GT=stacked(group, "entropy", -1.0),
    )


def batch_of(sequences: list[Sequence], groups: int = 1) -> TrainBatch:
    kept = [s for s in sequences if not s.get("erased", False)]
    return TrainBatch(
        logprobs_ST=stacked(sequences, "logp", 0.0).requires_grad_(),
        old_logprobs_ST=stacked(sequences, "old", 0.0),
        reference_logprobs_ST=stacked(sequences, "ref", 0.0),
        advantages_ST=stacked(sequences, "advantage", 0.0),
        mask_ST=mask_of(sequences),
        segments_ST=stacked(sequences, "segment", -1),
        group_sizes_S=torch.tensor([s["group_size"] for s in sequences]),
        erased_S=torch.tensor([bool(s.get("erased", False)) for s in sequences]),
        totals=Totals(groups, len(kept), sum(len(s["old"]) for s in kept), LIMIT),
    )


def loss_of(objective: Objective, batch: TrainBatch) -> Callable[[Tensor], Tensor]:
    """The loss as a function of the policy's log-probabilities, for gradient checks."""
    return lambda logprobs_ST: objective.loss(dataclasses.replace(batch, logprobs_ST=logprobs_ST)).value


def tokens(values_GT: Tensor, group: list[Sequence]) -> list[list[float]]:
    return [row[: len(s["old"])] for row, s in zip(values_GT.tolist(), group, strict=True)]
