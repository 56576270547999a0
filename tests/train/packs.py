"""Sequences to pack, made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from e3rl.train.packing import TrainSequence


def sequence(prompt: Sequence[int], response: Sequence[int], masked: int = 0, erased: bool = False) -> TrainSequence:
    """A sequence whose first ``masked`` response tokens the loss is not about."""
    mask_T = torch.arange(len(response)) >= masked
    zeros_T = torch.zeros(len(response))
    return TrainSequence(tuple(prompt), tuple(response), zeros_T.long(), mask_T, zeros_T, 0, 0, erased)
