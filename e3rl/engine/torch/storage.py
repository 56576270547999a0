"""Keys and values of rows that have lengths of their own.

Keys and values of a layer are one tensor each, ``[slots, kv_heads, capacity, head_dim]``. What lies behind a row's length
is stale and masked out, so that rolling a row back is nothing but forgetting a number. The storage does not know the
lengths: whoever uses it says where to write and how far to read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PACK = 4
"""Rows of a decode step come in multiples of this: with one to three rows the CPU's matrix kernels round otherwise than
with more, and a row's numbers must be the same, to the last bit, whatever else is decoded."""

BUCKET = 32
"""Capacities, and how far a decode step reads, are multiples of this. (Of 16 positions the CPU sums in another order.)"""


def packed(rows: int) -> int:
    """``rows`` rounded up to a multiple of `PACK`."""
    return -(-rows // PACK) * PACK


def bucketed(length: int) -> int:
    """``length`` rounded up to a multiple of `BUCKET`."""
    return -(-length // BUCKET) * BUCKET


def physical_slots(slots: int) -> int:
    """Slots in memory: what `packed` adds can be read, and the last one belongs to no row, so anything may be written."""
    return max(packed(slots), slots + 1)


class SlotStorage:
    """``slots`` rows of up to ``capacity`` positions in every layer that was added."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._blocks: list[Tensor] = []  # [layers, slots, ...]: the memory behind both

    @property
    def scratch(self) -> int:
        """The slot that the rows write to which fill up a step."""
        return physical_slots(self.slots) - 1

    @property
    def bytes(self) -> int:
        """Memory of all keys and values, used or not. It never changes once every layer is there."""
        return sum(block.nbytes for block in self._blocks)

    def add_layers(self, layers: int, kv_heads: int, key_dim: int, value_dim: int, like: Tensor) -> None:
        """Allocate layers, of the type and on the device of ``like``. Zeros: what is masked out must still be finite."""
        for storages, dim in ((self.keys, key_dim), (self.values, value_dim)):
            block = like.new_zeros((layers, physical_slots(self.slots), kv_heads, self.capacity, dim))
            self._blocks.append(block)
            storages += block.unbind(0)

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """The first ``length`` positions of one slot, copied to others."""
        for block in self._blocks:
            for target in targets:
                block[:, target, :, :length] = block[:, source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first ``length`` positions of two slots."""
        for block in self._blocks:
            kept = block[:, one, :, :length].clone()
            block[:, one, :, :length] = block[:, other, :, :length]
            block[:, other, :, :length] = kept

    def scrub(self, slot: int) -> None:
        """Zero a slot that may hold NaN, which a mask does not stop (0 * NaN)."""
        for block in self._blocks:
            block[:, slot].zero_()


class StepRows:
    """The rows of a decode step as tensors: those of the slots from ``first`` on, filled up to a multiple of `PACK`.

    A row that fills up reads what is there and writes to the scratch slot; what comes out of it is for nobody.
    """

    def __init__(
        self, ids: Sequence[int], positions: Sequence[int], storage: SlotStorage, device: torch.device, first: int = 0
    ) -> None:
        self.first = first
        self.spare = packed(len(ids)) - len(ids)
        self.last = max(positions)  # the largest position, known without asking the device
        filled = ([*values, *[values[0]] * self.spare] for values in (ids, positions))
        self.ids_R, self.positions_R = (torch.tensor(values, device=device) for values in filled)
        self.read = slice(first, first + packed(len(ids)))
        self.slots_R = torch.tensor([*range(first, first + len(ids)), *[storage.scratch] * self.spare], device=device)

    def advance(self, ids_R: Tensor) -> None:
        """On to the next position with these tokens; what a filling row drew may be no token at all."""
        self.ids_R = ids_R.clamp(min=0) if self.spare else ids_R
        self.positions_R = self.positions_R + 1
        self.last += 1
