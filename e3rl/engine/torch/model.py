"""A model over slots, in the way that is fastest for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from e3rl.engine.torch.cache import GenericSlotModel
from e3rl.engine.torch.fused import FusedSlotModel, FusedWeights, fusable
from e3rl.engine.torch.step_parts import Division
from e3rl.engine.torch.storage import SlotStorage, StepRows
from e3rl.models import unwrapped


class SlotModel(Protocol):
    """Runs prompts and decode steps over a `SlotStorage` and returns next-token logits."""

    storage: SlotStorage
    device: torch.device

    def refresh(self) -> None:
        """Take the model's weights again where they can be seen to have changed. No row may hold keys of others."""

    def take_weights(self) -> None:
        """Take the model's weights again, however they were changed. No row may hold keys of others."""

    def division(self, rows: int) -> Division:
        """How a decode step of ``rows`` rows is best divided among threads."""

    def prefill(self, ids: Sequence[int], slot: int) -> Tensor:
        """Run a prompt into a slot; logits of the token after it, [V]."""

    def decode(self, rows: StepRows) -> Tensor:
        """Feed each row's token at its position; logits of the tokens after them, [R, V]."""


def slot_model(model: Any, slots: int, max_length: int) -> SlotModel:
    """The forward pass written out where ``model`` is one of its family, else the model's own."""
    model = unwrapped(model)
    if fusable(model):
        return FusedSlotModel(FusedWeights.of(model), slots, max_length)
    return GenericSlotModel(model, slots, max_length)
