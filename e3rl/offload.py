"""What autograd keeps for the backward pass, held in the machine's memory in place of the device's.

Weights stay where they are. The backward pass gets every tensor back as it was, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

_Back = Callable[[], Tensor]


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """Inside the ``with`` block, what operations keep for the backward pass leaves the device; `bytes` counts it."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self.bytes = 0
        super().__init__(self._pack, lambda packed: packed() if callable(packed) else packed)

    def __enter__(self) -> Self:  # type: ignore[override]
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.untyped_storage()._cdata in self._weights:
            return tensor
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        flat = tensor.detach().as_strided((span,), (1,), tensor.storage_offset()) if tensor.numel() else tensor.detach()
        self.bytes += flat.numel() * flat.element_size()
        back, size, stride = _away(flat), tensor.size(), tensor.stride()
        return lambda: back().as_strided(size, stride, 0)  # with its strides, on which the order of a sum depends


def _away(flat: Tensor) -> _Back:
    """A copy in the machine's memory, and how it comes back. On a GPU both are copies in the order of its operations; the meta
    device, where plans are counted, has shapes alone."""
    device, size, dtype = flat.device, flat.numel(), flat.dtype
    if device.type == "meta":
        return lambda: torch.empty(size, dtype=dtype, device=device)
    host = torch.empty(size, dtype=dtype, pin_memory=device.type == "cuda").copy_(flat, non_blocking=True)
    return lambda: host.to(device, non_blocking=True)
