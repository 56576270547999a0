"""More requests than are decoded together: they take turns, and nothing shows of it but the number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from e3rl.engine.protocol import Engine, Row, Sampling
from e3rl.engine.recompute import RecomputeEngine
from e3rl.engine.requests import Request
from e3rl.engine.torch.engine import TURN, TorchEngine
from e3rl.testing.scripts import assert_same
from e3rl.types import Candidate, Draw
from tests.engine.models import ARCHITECTURES, tiny

LENGTH = 96
UNEVEN = [(3 - i % 2) * TURN - i for i in range(9)]


def _engine(model: Any, max_rows: int, rows: int) -> TorchEngine:
    return TorchEngine(model, eos_ids=(), max_rows=max_rows, cache_rows=rows, max_length=LENGTH)


def _ask(engine: Engine, lengths: Sequence[int]) -> list[Row]:
    """One row for each length, with a request of it."""
    rows = engine.prefill([4, 5, 6], len(lengths))
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        engine.extend(row, length, Draw(5, 0, "p", i, 0, 0), Sampling())
    return rows


def _candidates(engine: Engine, lengths: Sequence[int]) -> list[Candidate]:
    rows, found = _ask(engine, lengths), {}
    while delivered := engine.poll():
        found.update(delivered)
    return [found[row] for row in rows]


def test_long_requests_take_turns():
    engine = _engine(tiny("Llama"), max_rows=2, rows=3)
    rows = _ask(engine, [2 * TURN] * 3)
    assert [[row for row, _ in engine.poll()] for _ in rows] == [[row] for row in rows]
    # each to its end before the next begins: 4 * TURN - 2, half of them with one row
    assert engine.stats.decode_steps == 3 * TURN - 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # written out, and the model's own forward pass
def test_turns_do_not_show_in_the_result(attention: str):
    model = tiny("Qwen3", attention)
    oracle = RecomputeEngine(model, eos_ids=(), cache_rows=9, max_length=LENGTH)
    for got, expected in zip(_candidates(_engine(model, 4, 9), UNEVEN), _candidates(oracle, UNEVEN), strict=True):
        assert_same(got, expected, 1e-5, "a candidate in turns")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_turns_do_not_show_in_the_bits(name: str):
    together = _candidates(_engine(tiny(name), 9, 9), UNEVEN)
    for max_rows in (1, 4):
        assert _candidates(_engine(tiny(name), max_rows, 9), UNEVEN) == together


def test_rows_that_take_turns_stay_where_they_are():
    engine = _engine(tiny("Llama"), max_rows=4, rows=8)
    _candidates(engine, [2 * TURN + 1] * 8)
    assert engine.stats.moved_tokens == 0  # the first four slots and the other four by turns


def test_waiting_requests_draw_their_first_tokens_at_once():
    engine = _engine(tiny("Llama"), max_rows=2, rows=4)
    rows = _ask(engine, [9, 9, 1, 1])
    assert [row for row, _ in engine.poll()] == rows[2:]
    assert engine.stats.decode_steps == 0


def test_a_turn_is_over_with_its_last_token():
    request = Request(60, Draw(0, 0, "p", 0, 0, 0), Sampling(), np.zeros(60))
    turns = []
    for tokens in (0, TURN - 1, TURN, 2 * TURN - 1, 2 * TURN):
        request.ids = [5] * tokens
        turns.append(request.turns(TURN))
    assert turns == [0, 0, 1, 1, 2]
