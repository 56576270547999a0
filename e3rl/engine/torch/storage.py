"""Slots: keys and values of rows that have lengths of their own, which row lives in which slot, how many fit.

Keys and values of a layer are one tensor each, ``[slots, kv_heads, capacity, head_dim]``. Positions beyond a row's length
are stale and masked out, so rolling a row back only lowers its length. The storage does not know the lengths: whoever uses
it says where to write and how far to read.

Layers with a recurrent state have that in place of keys and values, ``[slots, ...]``. It can't be shortened, so there is one
snapshot of it for each row, made where the row may have to go back to.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from e3rl.errors import UserError

K = TypeVar("K", bound=Hashable)

MIB = 2**20

StateName = tuple[str, int, int]
"""Of a recurrent state: what it is, its layer, which of the layer's states of this kind."""

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


class RowSize(NamedTuple):
    """Bytes that a row takes: of each position, and of its recurrent states, which don't grow, with their snapshot."""

    position: int
    states: int = 0

    def of(self, positions: int) -> int:
        """Bytes of a row that can hold so many positions."""
        return self.position * bucketed(positions) + self.states


class SlotStorage:
    """``slots`` rows of up to ``capacity`` positions in every layer that was added."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.states: dict[StateName, Tensor] = {}
        self._snapshots: dict[StateName, Tensor] = {}  # by number of the row, wherever that lives
        self._blocks: list[Tensor] = []  # [layers, slots, ...]: the memory behind keys and values

    @property
    def scratch(self) -> int:
        """The slot that padding rows of a step write to."""
        return physical_slots(self.slots) - 1

    @property
    def bytes(self) -> int:
        """Memory of all keys, values and states, used or not. It never changes once every layer is there."""
        return sum(block.nbytes for block in self._blocks) + self.state_bytes

    @property
    def state_bytes(self) -> int:
        """Memory of recurrent states and their snapshots."""
        return 2 * sum(states.nbytes for states in self.states.values())

    @property
    def row_size(self) -> RowSize:
        """What a row takes. Every layer must be there."""
        slots = physical_slots(self.slots)
        of_positions = (self.bytes - self.state_bytes) // (slots * self.capacity)
        return RowSize(of_positions, self.state_bytes // slots)

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
        for states in self.states.values() if targets else ():
            states[torch.tensor(targets)] = states[source].clone()

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first ``length`` positions of two slots, and their states."""
        for block in self._blocks:
            kept = block[:, one, :, :length].clone()
            block[:, one, :, :length] = block[:, other, :, :length]
            block[:, other, :, :length] = kept
        for states in self.states.values():
            states[torch.tensor((one, other))] = states[torch.tensor((other, one))]

    def scrub(self, slot: int) -> None:
        """Zero a slot that may hold NaN, which a mask does not stop (0 * NaN)."""
        for block in self._blocks:
            block[:, slot].zero_()
        self.clear_states(slot)

    def add_state(self, name: StateName, like_1: Tensor) -> None:
        """Allocate a recurrent state, of the shape and type of one row's."""
        self.states[name] = like_1.new_zeros((physical_slots(self.slots), *like_1.shape[1:]))
        self._snapshots[name] = torch.zeros_like(self.states[name])

    def clear_states(self, slot: int) -> None:
        """States as they are before the first token."""
        for states in self.states.values():
            states[slot].zero_()

    def keep_states(self, slots: Sequence[int], numbers: Sequence[int]) -> None:
        """Take the snapshots of rows with these numbers, which live in ``slots`` now."""
        for name, states in self.states.items():
            self._snapshots[name][torch.tensor(numbers)] = states[torch.tensor(slots)]

    def restore_states(self, slots: Sequence[int], numbers: Sequence[int]) -> None:
        """States of the rows in ``slots`` as they were when their snapshots were taken."""
        for name, states in self.states.items() if slots else ():
            states[torch.tensor(slots)] = self._snapshots[name][torch.tensor(numbers)]


class StepRows:
    """The rows of a decode step as tensors: those of the slots from ``first`` on, filled up to a multiple of `PACK`.

    A padding row reads any slot and writes to the scratch slot; its output is dropped.
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
        """Go to the next position with these tokens; `NON_FINITE` is replaced by a valid id."""
        self.ids_R = ids_R.clamp(min=0)
        self.positions_R = self.positions_R + 1
        self.last += 1


class Move(NamedTuple, Generic[K]):
    """``row`` goes from slot ``source`` to slot ``target``; ``evicted``, if any, goes the other way."""

    row: K
    source: int
    target: int
    evicted: K | None


class SlotMap(Generic[K]):
    """A one-to-one map of rows to slots in which chosen rows can be packed side by side."""

    def __init__(self, slots: int) -> None:
        self._row_at: list[K | None] = [None] * slots
        self._slot_of: dict[K, int] = {}

    @property
    def free(self) -> int:
        """Slots without a row."""
        return len(self._row_at) - len(self._slot_of)

    def slot(self, row: K) -> int:
        """Where the row lives now."""
        return self._slot_of[row]

    def take(self, row: K) -> int:
        """Give the row the first free slot."""
        slot = self._row_at.index(None)
        self._put(row, slot)
        return slot

    def give_back(self, row: K) -> int:
        """Forget the row; its slot is free at once."""
        slot = self._slot_of.pop(row)
        self._row_at[slot] = None
        return slot

    def fullest(self, rows: Sequence[K], starts: Sequence[int]) -> int:
        """The start of the run of slots that holds most of ``rows`` already."""
        slots = [self._slot_of[row] for row in rows]
        return max(starts, key=lambda start: sum(start <= slot < start + len(rows) for slot in slots))

    def pack(self, rows: Sequence[K], first: int = 0) -> list[Move[K]]:
        """Bring ``rows`` into the slots from ``first`` on, in any order, with as few moves as possible.

        The moves are already made in the map; the caller makes them in the cache, in the order given.
        """
        window, wanted = range(first, first + len(rows)), set(rows)
        open_slots = [slot for slot in window if self._row_at[slot] not in wanted]
        strays = [row for row in rows if self._slot_of[row] not in window]
        return [self._move(row, target) for row, target in zip(strays, open_slots, strict=True)]

    def _move(self, row: K, target: int) -> Move[K]:
        source, evicted = self._slot_of[row], self._row_at[target]
        self._put(row, target)
        self._row_at[source] = None
        if evicted is not None:
            self._put(evicted, source)
        return Move(row, source, target, evicted)

    def _put(self, row: K, slot: int) -> None:
        self._row_at[slot] = row
        self._slot_of[row] = slot


def rows_within(budget: int, row_bytes: int, wanted: int, group: int, positions: int) -> int:
    """The most rows, up to ``wanted``, whose slots take at most ``budget`` bytes; 0 sets no bound.

    UserError where a group of ``group`` rows would never fit.
    """
    if not budget:
        return wanted
    rows = max((n for n in range(1, wanted + 1) if physical_slots(n) * row_bytes <= budget), default=0)
    if rows < min(group, wanted):
        needed = -(-physical_slots(group) * row_bytes // MIB)
        raise UserError(
            f"rollout.kv_budget = {budget // MIB} MiB holds {rows} rows of {positions} tokens "
            f"({row_bytes / MIB:.3g} MiB each), and a group of {group} siblings needs {needed} MiB: raise it to that, or "
            "lower rollout.num_generations, segment_length, max_segments or max_completion_length"
        )
    return rows
