"""Additive metrics: (sum, count) pairs, so that micro-batches, groups and ranks can be added up."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Pair = tuple[float, float]


def measured(present: Tensor, values: Mapping[str, Tensor]) -> dict[str, Pair]:
    """(sum over ``present``, count) of each tensor, moved off the device in one go."""
    sums = [value.detach().float().where(present, 0.0).sum() for value in values.values()]
    *totals, count = torch.stack([*sums, present.sum().float()]).tolist()
    return {name: (total, count) for name, total in zip(values, totals, strict=True)}


def measured_by_segment(name: str, values_SN: Tensor, present_SN: Tensor) -> dict[str, Pair]:
    """``name/segment_0``, ``name/segment_1``, ...: (sum, count) over the sequences that have that segment."""
    sums_N = values_SN.detach().float().where(present_SN, 0.0).sum(0)
    pairs = torch.stack([sums_N, present_SN.sum(0).float()], -1).tolist()
    return {f"{name}/segment_{n}": (total, count) for n, (total, count) in enumerate(pairs)}


def sign_flips(advantages_GT: Tensor, rewards_G: Tensor, mask_GT: Tensor) -> Pair:
    """How many tokens have an advantage opposed to their response's reward against the group mean, out of how many.

    Tokens of a response exactly at the mean have no sign to be opposed to and are not counted.
    """
    side_G = (rewards_G - rewards_G.mean()).sign()
    counted_GT = mask_GT & (side_G != 0)[:, None]
    opposed_GT = advantages_GT.sign() == -side_G[:, None]
    return float((opposed_GT & counted_GT).sum()), float(counted_GT.sum())
