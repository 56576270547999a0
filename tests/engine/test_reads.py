"""Decoding asks the device for nothing but what was drawn, once a poll: counted on a stand-in device, which has no values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from e3rl.engine.protocol import Row, Sampling
from e3rl.engine.torch import operations
from e3rl.engine.torch.decode import READ_AFTER
from e3rl.engine.torch.engine import TorchEngine
from e3rl.testing.reads import META, DeviceReads
from e3rl.types import Candidate, Draw
from tests.engine.models import VOCAB, tiny

PROMPT = [5, 9, 2, 7]
SAMPLING = [Sampling(), Sampling(temperature=0.7, top_p=0.9, top_k=5), Sampling(temperature=0.5, measured_at=1.0)]


def _engine(model: Any, eos_ids: tuple[int, ...]) -> TorchEngine:
    return TorchEngine(model, eos_ids=eos_ids, max_rows=4, cache_rows=4, max_length=128)


def _on_stand_in(family: str) -> TorchEngine:
    with DeviceReads():  # its check compares values
        return _engine(copy.deepcopy(tiny(family)).to(META), (1,))


def _extend(engine: TorchEngine, rows: list[Row], tokens: int, segment: int = 0) -> None:
    for sibling, row in enumerate(rows):
        engine.extend(row, tokens, Draw(3, 1, "one", sibling, segment, 0), SAMPLING[sibling % 3])


@pytest.mark.parametrize("family", ["Qwen3", "Llama", "Mistral"])
def test_a_poll_reads_once_and_its_steps_nothing(family: str):
    engine = _on_stand_in(family)
    with DeviceReads() as prefill:
        rows = engine.prefill(PROMPT, 3)
    assert not prefill.reads
    _extend(engine, rows, READ_AFTER)
    with DeviceReads() as first:
        assert len(engine.poll()) == 3
    assert first.reads == {"engine/torch/decode.py:read": 2}, "the first tokens, drawn without a step, and the steps"
    _extend(engine, rows, READ_AFTER, segment=1)
    with DeviceReads() as found:
        assert len(engine.poll()) == 3
    assert engine.stats.decode_steps == 2 * READ_AFTER - 1
    assert found.reads == {"engine/torch/decode.py:read": 1}
    with DeviceReads() as again:
        for row in rows:
            engine.rollback(row, READ_AFTER)
        _extend(engine, rows, 2 * READ_AFTER, segment=2)
        engine.poll()
    places = {place.partition(":")[0] for place in again.copies}
    assert places <= {"engine/torch/decode.py", "engine/torch/storage.py"}, "no step copies anything to the device"
    assert sum(again.copies.values()) <= 9


def _decoded(read_after: int, tokens: int) -> list[Candidate]:
    """What four rows draw in two segments; some of them end."""
    engine = _engine(copy.deepcopy(tiny("Qwen3")), tuple(range(0, VOCAB, 32)))
    engine._read_after = read_after
    rows = engine.prefill(PROMPT, 4)
    found = []
    for segment in range(2):
        _extend(engine, rows, tokens, segment)
        left, done = dict(enumerate(rows)), dict[Row, Candidate]()
        while len(done) < len(left):
            done |= dict(engine.poll())
        found += [done[row] for row in rows]
        engine.rollback(rows[0], 1)
    return found


def test_how_often_is_read_changes_nothing_that_is_drawn():
    expected, found = _decoded(1, 24), _decoded(5, 24)
    assert {c.ended for c in expected} == {True, False}
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == theirs


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of PyTorch's attention, by its arguments."""
    made: list[dict[str, Any]] = []

    def record(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        made.append({"heads": query.shape[1], "keys": key.shape[1], "dtype": query.dtype, **options})
        return query * 1.0

    monkeypatch.setattr(operations, "scaled_dot_product_attention", record)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "masked"), [(6, 6, False), (3, 6, False), (3, 6, True)])
def test_off_the_cpu_no_kernel_holds_a_matrix_of_scores(
    calls: list[dict[str, Any]], dtype: torch.dtype, queries: int, keys: int, masked: bool
):
    """The kernel that does is taken for heads in groups with a mask or in float32."""
    query = torch.empty(1, 4, queries, 8, device=META, dtype=dtype)
    key = torch.empty(1, 2, keys, 8, device=META, dtype=dtype)
    mask = torch.empty(queries, keys, device=META, dtype=dtype) if masked else None
    operations.attention(query, key, key, mask, 1.0)
    (call,) = calls
    flash = dtype == torch.bfloat16 and not masked
    assert call.get("enable_gqa", False) is flash
    assert call["keys"] == (2 if flash else 4)
    assert call["is_causal"] is (not masked and queries == keys)
    assert type(call["attn_mask"]).__name__ == ("Tensor" if masked else "NoneType" if queries == keys else "CausalBias")


def test_a_decode_step_off_the_cpu_has_its_heads_as_queries(calls: list[dict[str, Any]]):
    engine = _on_stand_in("Qwen3")
    rows = engine.prefill(PROMPT, 3)
    _extend(engine, rows, 4)
    calls.clear()
    with DeviceReads():
        engine.poll()
    assert len(calls) > 3
    assert all(call["heads"] == call["keys"] and not call.get("enable_gqa") for call in calls)
