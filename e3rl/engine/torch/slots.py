"""Which sequence lives in which slot of a KV cache. Bookkeeping only: no tensors."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)


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
        """The one of ``starts`` from which on as many slots as there are ``rows`` hold the most of them already."""
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
