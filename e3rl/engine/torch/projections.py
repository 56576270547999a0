"""Matrix products of a decode step: several linear layers that share an input, applied at once.

On a CPU the weights are copied: stacked, and large ones laid out for oneDNN, whose kernels are faster for few rows than
those behind `torch.nn.functional.linear`. On a GPU the layers' own weights are used where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Projection = Callable[[Tensor], Tensor]
"""From the layers' common input to their outputs side by side."""


_LARGE = 2**17
"""Entries of a weight from which oneDNN's kernels save more than the 12 microseconds that a call of them costs."""


def project(layers: Sequence[nn.Linear]) -> Projection:
    """The layers' outputs, concatenated."""
    weight = layers[0].weight
    if weight.device.type != "cpu":
        return _InPlace(layers)
    large = sum(layer.weight.numel() for layer in layers) >= _LARGE
    packs = large and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return _Packed(layers) if packs else _Stacked(layers)


def _stacked(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    return torch.cat([layer.weight.detach() for layer in layers]), torch.cat(biases) if biases else None


class _Stacked:
    """A copy of the weights on top of each other. What is written to the layers later is not seen."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._weight, self._bias = _stacked(layers)

    def __call__(self, x_RD: Tensor) -> Tensor:
        return nn.functional.linear(x_RD, self._weight, self._bias)


class _Packed:
    """As `_Stacked`, in oneDNN's own layout."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weight, self._bias = _stacked(layers)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)

    def __call__(self, x_RD: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_RD, self._weight, self._bias, "none", [], "")
        return product


class _InPlace:
    """The layers as they are: no copy."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers = layers

    def __call__(self, x_RD: Tensor) -> Tensor:
        return torch.cat([nn.functional.linear(x_RD, layer.weight, layer.bias) for layer in self._layers], -1)


def fingerprint(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Where the parameters lie and how often they were written to: changes when the weights do.

    Writes through ``parameter.data`` are not counted: after such, say so by `Engine.load_weights`.
    """
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())
