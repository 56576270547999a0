"""Bytes of a model that one rank holds, by the value of ``train.parallel``, for a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from e3rl.cluster.deepspeed import BUCKET
from e3rl.errors import UserError
from e3rl.models import unwrapped
from e3rl.plan.gradients import GradientBuckets, LayerGradients
from e3rl.train.optimizer import by_kind, scratch_bytes

_DIVIDES: dict[str, frozenset[str]] = {
    "ddp": frozenset(),
    "zero1": frozenset({"state"}),
    "zero2": frozenset({"weights", "gradients", "state"}),
    "fsdp2": frozenset({"weights", "gradients", "state"}),
    "deepspeed-zero2": frozenset({"gradients", "state"}),
    "deepspeed-zero3": frozenset({"weights", "gradients", "state"}),
}


@dataclass(frozen=True)
class ShardCounts:
    """How weights, gradients and optimizer state of a model are divided among ranks."""

    ranks: int
    divides: frozenset[str]
    layers: Mapping[int, int]  # the decoder's layers, by ids of their parameters
    buckets: bool  # DeepSpeed's ZeRO-2 gathers gradients in buckets
    copies_float32: bool  # DeepSpeed keeps its own float32 weights even of a float32 model
    keeps_gathered: bool  # zero2 keeps a layer's whole weights from its forward to its backward pass

    @classmethod
    def of(cls, model: Any, parallel: str, ranks: int) -> ShardCounts:
        """The division of ``model``; with a single rank nothing is divided."""
        if ranks > 1 and parallel == "none":
            raise UserError(
                f"{ranks} ranks that train together need train.parallel: set it to one of {', '.join(_DIVIDES)}"
            )
        base = unwrapped(model)
        layers = getattr(getattr(base, base.base_model_prefix), "layers", None) or ()
        return cls(
            ranks=ranks,
            divides=_DIVIDES[parallel] if ranks > 1 else frozenset(),
            layers={id(p): number for number, layer in enumerate(layers) for p in layer.parameters()},
            buckets=ranks > 1 and parallel == "deepspeed-zero2",
            copies_float32=ranks > 1 and parallel.startswith("deepspeed"),
            keeps_gathered=parallel == "zero2",
        )

    @property
    def divides_weights(self) -> bool:
        """Whether no rank holds all weights between passes."""
        return "weights" in self.divides

    def weights(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of the weights between passes."""
        return sum(p.nbytes // self._parts("weights") for p in parameters)

    def frozen(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of a reference model's weights: FSDP2 divides them like the trained ones, DeepSpeed doesn't."""
        return sum(p.nbytes // (1 if self.copies_float32 else self._parts("weights")) for p in parameters)

    def gradients(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of the gradients, in float32."""
        return sum(4 * p.numel() // self._parts("gradients") for p in parameters)

    def state(self, parameters: Iterable[nn.Parameter], width: float) -> int:
        """Bytes of the optimizer's state, ``width`` for each entry of a parameter."""
        return sum(int(width * p.numel()) // self._parts("state") for p in parameters)

    def gathered(self, parameters: Iterable[nn.Parameter], layers: int) -> int:
        """Peak bytes of gathered weights beside a rank's own part: all layers, or two (one in use, one being gathered)."""
        if not self.divides_weights:
            return 0
        missing = {p: p.nbytes - p.nbytes // self._parts("weights") for p in parameters}
        of_layers = sum(size for p, size in missing.items() if id(p) in self.layers)
        beside = sum(missing.values()) - of_layers  # the output matrix is held through the whole pass
        return beside + (of_layers if self.keeps_gathered else min(of_layers, 2 * of_layers // layers))

    def collector(self, parameters: Sequence[nn.Parameter]) -> GradientBuckets | LayerGradients | None:
        """What stands for the gathering of gradients; None where each is added up by itself."""
        if self.buckets:
            entries = sum(p.numel() for p in parameters)
            return GradientBuckets(parameters, min(BUCKET, entries), entries // self.ranks)
        return LayerGradients(parameters, self.layers) if self.divides_weights else None

    def scratch(self, parameters: Sequence[nn.Parameter]) -> int:
        """Bytes of an update's temporaries. DeepSpeed updates a rank's whole part of each kind at once, of a float32 model with
        its gradients laid out once more."""
        kinds = by_kind(parameters)
        if self.copies_float32:
            parts = [sum(p.numel() for p in kind) // self.ranks for kind in kinds]
            again = sum(p.nbytes for p in parameters if p.dtype == torch.float32) // self.ranks if self.buckets else 0
            return scratch_bytes(parts) + again
        parts_of_each = self.ranks if self.divides_weights else 1
        return max(scratch_bytes([p.numel() // parts_of_each for p in kind]) for kind in kinds)

    def _parts(self, what: str) -> int:
        return self.ranks if what in self.divides else 1
