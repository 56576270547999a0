"""Slot bookkeeping: moves that really bring the right rows side by side, and no more of them than needed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e3rl.engine.torch.storage import Move, SlotMap


def filled(slots: int, rows: str) -> SlotMap[str]:
    """Row i in slot i."""
    slot_map: SlotMap[str] = SlotMap(slots)
    for row in rows:
        slot_map.take(row)
    return slot_map


def test_take_uses_the_first_free_slot():
    slots = filled(4, "abc")
    assert [slots.slot(row) for row in "abc"] == [0, 1, 2]
    assert slots.give_back("b") == 1
    assert slots.free == 2
    assert slots.take("d") == 1


def test_pack_moves_only_strays():
    slots = filled(5, "abcd")
    assert slots.pack(["a", "d"]) == [Move("d", 3, 1, "b")]
    assert {row: slots.slot(row) for row in "abcd"} == {"a": 0, "d": 1, "c": 2, "b": 3}
    assert slots.pack(["d", "a"]) == []


def test_pack_from_the_fullest_start_moves_least():
    slots = filled(6, "abcdef")
    assert slots.fullest(["a", "e", "f"], [0, 3]) == 3
    assert slots.fullest(["a", "d"], [0, 3]) == 0
    assert slots.pack(["a", "e", "f"], 3) == [Move("a", 0, 3, "d")]
    assert slots.pack(["d", "b"], 0) == []


def test_pack_into_an_empty_slot_evicts_nobody():
    slots = filled(3, "abc")
    slots.give_back("a")
    assert slots.pack(["c"]) == [Move("c", 2, 0, None)]
    assert slots.free == 1


@settings(max_examples=200)
@given(st.data())
def test_moves_carried_out_in_a_cache_keep_every_row_whole(data):
    slots: SlotMap[int] = SlotMap(6)
    cache: list[int | None] = [None] * 6  # what lies in a slot: the row it was written for
    held: set[int] = set()
    for number in range(data.draw(st.integers(1, 15))):
        if slots.free and data.draw(st.booleans()):
            cache[slots.take(number)] = number
            held.add(number)
        elif held:
            held.remove(row := data.draw(st.sampled_from(sorted(held))))
            slots.give_back(row)
        wanted = data.draw(st.permutations(sorted(held)))[: data.draw(st.integers(0, len(held)))]
        before = [slots.slot(row) for row in wanted]
        first = data.draw(st.integers(0, 6 - len(wanted)))
        moves = slots.pack(wanted, first)
        for _, source, target, evicted in moves:
            stale = cache[target]
            cache[target] = cache[source]
            cache[source] = stale if evicted is not None else None
        assert sorted(slots.slot(row) for row in wanted) == list(range(first, first + len(wanted)))
        assert all(cache[slots.slot(row)] == row for row in held)
        assert slots.free == 6 - len(held)
        assert len(moves) == sum(not first <= slot < first + len(wanted) for slot in before)


def test_a_row_that_is_not_there_is_an_error():
    with pytest.raises(KeyError):
        filled(2, "a").give_back("b")
