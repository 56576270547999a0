"""Recorded decode steps: a recording reads its buffers and the cache and nothing else, and plays what a fresh step gives."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from e3rl.engine.protocol import Sampling
from e3rl.engine.torch.engine import TorchEngine
from e3rl.engine.torch.fused import FusedSlotModel, FusedWeights
from e3rl.engine.torch.recorded import RecordedSteps, Step, cuda_graph
from e3rl.engine.torch.storage import physical_slots
from e3rl.types import Draw
from tests.engine.models import ARCHITECTURES, build, tiny

SLOTS = 20


def as_operations(step: Step) -> Step:
    """What a CUDA graph does, on a CPU: the operations of one run with the tensors they touched, no Python of ours."""
    return make_fx(step)()


def slot_model(name: str) -> FusedSlotModel:
    model = FusedSlotModel(FusedWeights.of(tiny(name)), SLOTS, 600)
    for slot in range(SLOTS):
        model.prefill([2 + (5 * slot + i) % 50 for i in range(3 + slot)], slot)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_recording_plays_what_a_fresh_step_gives(name):
    with torch.inference_mode():
        fresh, recorded = slot_model(name), slot_model(name)
        slots, capacity = physical_slots(SLOTS), recorded.storage.capacity
        shapes: list[int] = []

        def record(step: Step) -> Step:
            shapes.append(1)
            return as_operations(step)

        play = RecordedSteps(recorded.step, record, slots, capacity, recorded.device)
        for turn in range(5):
            for rows, width in ((4, 32), (20, 64), (16, 32)):
                ids_R = torch.arange(rows) % 7 + 2 + turn
                positions_R = torch.arange(rows) + 3 + turn
                expected = fresh.step(ids_R, positions_R, torch.arange(rows), width)
                got = play(ids_R, positions_R, torch.arange(rows), width)
                assert torch.allclose(got, expected, atol=1e-5)
        assert len(shapes) == 2  # 16 rows and 21, both of 256 positions
        for mine, theirs in zip(recorded.storage.keys, fresh.storage.keys, strict=True):
            assert torch.allclose(mine[:SLOTS], theirs[:SLOTS], atol=1e-5)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA graphs need a GPU: recordings are tested as lists of operations"
)
def test_an_engine_on_a_gpu_generates_what_the_cpu_does():
    found = []
    for device in ("cpu", "cuda"):
        engine = TorchEngine(build("Qwen3").to(device), eos_ids=(), max_rows=6, cache_rows=6, max_length=64)
        rows = engine.prefill([4, 5, 6], 6)
        for sibling, row in enumerate(rows):
            engine.extend(row, 9 + sibling, Draw(0, 0, "p", sibling, 0, 0), Sampling())
        candidates = {}
        while delivered := engine.poll():
            candidates |= dict(delivered)
        found.append([candidates[row].ids.tolist() for row in rows])
    assert found[0] == found[1]
    assert callable(cuda_graph)
