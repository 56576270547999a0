"""What one of several ranks holds of a model that they train together, by the value of ``train.parallel``: bytes, for a plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from e3rl.errors import UserError
from e3rl.models import unwrapped


@dataclass(frozen=True)
class Division:
    """Into how many parts a decoder's layers are divided, for each thing that is kept of them."""

    layers: frozenset[int]  # ids of the parameters that zero2 and fsdp2 divide
    of_weights: int  # zero2, fsdp2
    of_gradients: int  # zero2, fsdp2
    of_state: int  # zero1 divides the state of all parameters, zero2 and fsdp2 that of the layers
    state_of_all: bool
    keeps_gathered: bool  # zero2 keeps a layer's whole weights from its forward to its backward pass

    @classmethod
    def of(cls, model: Any, parallel: str, ranks: int) -> Division:
        """The division of ``model``; that of a single rank divides nothing."""
        if ranks > 1 and parallel == "none":
            raise UserError(
                f"{ranks} ranks train together in one of several ways: set train.parallel=ddp, zero1, zero2 or fsdp2"
            )
        base = unwrapped(model)
        layers = getattr(getattr(base, base.base_model_prefix), "layers", None) or ()
        sharded = ranks if parallel in ("zero2", "fsdp2") else 1
        return cls(
            layers=frozenset(id(p) for layer in layers for p in layer.parameters()),
            of_weights=sharded,
            of_gradients=sharded,
            of_state=ranks if parallel == "zero1" else sharded,
            state_of_all=parallel == "zero1",
            keeps_gathered=parallel == "zero2",
        )

    def weights(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of the weights between passes."""
        return sum(p.nbytes // self._parts(p, self.of_weights) for p in parameters)

    def gradients(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes of the gradients, in the weights' own type."""
        return sum(p.nbytes // self._parts(p, self.of_gradients) for p in parameters)

    def state(self, parameters: Iterable[nn.Parameter], width: int) -> int:
        """Bytes of what the optimizer keeps, ``width`` of it for each entry of a parameter."""
        return sum(
            width * p.numel() // (self.of_state if self.state_of_all else self._parts(p, self.of_state))
            for p in parameters
        )

    def gathered(self, parameters: Iterable[nn.Parameter], layers: int) -> int:
        """Bytes of whole layers beside a rank's own parts at the worst moment: of all layers, or of two, one on its way."""
        if self.of_weights == 1:
            return 0
        missing = sum(p.nbytes - p.nbytes // self.of_weights for p in parameters if id(p) in self.layers)
        return missing if self.keeps_gathered else min(missing, 2 * missing // layers)

    def _parts(self, parameter: nn.Parameter, ranks: int) -> int:
        return ranks if id(parameter) in self.layers else 1
