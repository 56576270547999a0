"""Stand-ins for what gathers gradients over ranks: they take a pass's gradients as it does, and exchange nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class LayerGradients:
    """Stands for FSDP2. A layer's gradients are kept until all are there, then copied as float32 to be added up over ranks; that
    copy stays until the next layer's begins. Those of no layer wait for the end of the backward pass."""

    def __init__(self, parameters: Iterable[nn.Parameter], layers: Mapping[int, int]) -> None:
        self._layers = layers  # by id of a parameter
        self._missing: dict[int, int] = defaultdict(int)  # by layer: gradients to come
        self._waiting: dict[int, list[Tensor]] = defaultdict(list)
        self._copies: list[Tensor] = []
        for parameter in parameters:
            self._missing[layers.get(id(parameter), -1)] += 1
            parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        layer = self._layers.get(id(parameter), -1)
        if gradient is not None:
            self._waiting[layer].append(gradient)
        if layer >= 0 and len(self._waiting[layer]) == self._missing[layer]:
            self._exchange(layer)

    def _exchange(self, layer: int) -> None:
        gradients = self._waiting.pop(layer)
        self._copies.clear()
        entries = sum(map(torch.numel, gradients))
        self._copies.append(gradients[0].new_empty(entries, dtype=torch.float32))

    def finish(self) -> None:
        """The end of a backward pass."""
        for layer in [*self._waiting]:
            self._exchange(layer)
        self._copies.clear()


class GradientBuckets:
    """Stands for DeepSpeed's ZeRO-2, as the rank that has most of the gradient at hand.

    A gradient is copied into one of two buffers of ``entries`` each, which are there from the first of a backward pass to its
    end; one that is larger waits as it is. What a buffer holds is copied once more to be added up over ranks, and a rank's part
    of it, of at most ``part`` entries of a parameter, becomes float32. Of a float32 model it keeps those of the pass beside those
    before.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], entries: int, part: int) -> None:
        self._entries, self._part = entries, part
        self._buffers: list[Tensor] = []
        self._waiting: list[Tensor] = []  # gradients, of shape alone where they are in a buffer
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if not self._buffers:
            of_the_pass = self._part if gradient.dtype == torch.float32 else 0
            self._buffers = [gradient.new_empty(size) for size in (self._entries, self._entries, of_the_pass)]
        if sum(map(torch.numel, self._waiting)) + gradient.numel() > self._entries:
            self._exchange()
        if gradient.numel() <= self._entries:
            gradient = self._buffers[0][: gradient.numel()]
        self._waiting.append(gradient)

    def _exchange(self) -> None:
        entries = sum(map(torch.numel, self._waiting))
        if entries:
            copy = self._waiting[0].new_empty(min(entries, self._entries + self._part))
            largest = min(self._part, max(map(torch.numel, self._waiting)))
            copy[:largest].float()
        self._waiting.clear()

    def finish(self) -> None:
        """The end of a backward pass."""
        self._exchange()
        self._buffers.clear()
