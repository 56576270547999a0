"""Recorded decode steps: a recording reads its buffers and the cache and nothing else, and plays what a fresh step gives."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from e3rl.engine.protocol import Sampling
from e3rl.engine.torch.engine import TorchEngine
from e3rl.engine.torch.fused import FusedSlotModel, FusedWeights
from e3rl.engine.torch.recorded import MOST, WIDTH, RecordedSteps, Step, allocates
from e3rl.engine.torch.storage import physical_slots
from e3rl.train.optimizer import MasterOptimizer
from e3rl.train.scoring import Passes
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
        logits_SV = torch.empty(physical_slots(SLOTS), tiny(name).lm_head.out_features)
        shapes: list[int] = []

        def record(step: Step) -> Step:
            shapes.append(1)
            return as_operations(step)

        play = RecordedSteps(recorded.step, record, recorded.storage.capacity, logits_SV)
        for turn in range(5):
            for rows, width in ((4, 32), (20, 64), (16, 32)):
                ids_R = torch.arange(rows) % 7 + 2 + turn
                positions_R = torch.arange(rows) + 3 + turn
                expected = fresh.step(ids_R, positions_R, torch.arange(rows), width)
                got = play(ids_R, positions_R, torch.arange(rows), width)
                assert torch.allclose(got, expected, atol=1e-5)
                assert got.data_ptr() == logits_SV.data_ptr(), "nothing of the shared memory is given away"
        assert len(shapes) == 2  # 16 rows and 21, both of 256 positions
        for mine, theirs in zip(recorded.storage.keys, fresh.storage.keys, strict=True):
            assert torch.allclose(mine[:SLOTS], theirs[:SLOTS], atol=1e-5)


def test_the_latest_recordings_are_kept():
    """A shape that was played meanwhile outlives older ones; one that was let go is recorded again."""
    shapes: list[int] = []

    def step(ids_R: Tensor, positions_R: Tensor, slots_R: Tensor, width: int, first: int = 0) -> Tensor:
        return torch.full((len(ids_R), 3), float(width))

    def record(step: Step) -> Step:
        shapes.append(int(step()[0, 0]))
        return step

    play = RecordedSteps(step, record, (MOST + 2) * WIDTH, torch.empty(4, 3))
    rows = torch.zeros(2, dtype=torch.long)
    for turn in [*range(1, MOST + 1), 1, MOST + 1, 1, 2]:
        assert play(rows, rows, rows, turn * WIDTH).tolist() == [[float(turn * WIDTH)] * 3] * 2
    assert shapes == [turn * WIDTH for turn in [*range(1, MOST + 2), 2]]


def test_no_pass_of_training_runs_while_a_step_is_recorded():
    """Nor does a recording begin during one: allocations of another thread would spoil it."""
    order: list[str] = []
    recording, begun = threading.Event(), threading.Event()

    class Slow(Passes):
        @allocates
        def backward(self, loss: Tensor) -> None:
            order.append("backward")

    def train() -> None:
        recording.wait(10)
        begun.set()
        Slow().backward(torch.zeros(()))

    def record(step: Step) -> Step:
        recording.set()
        begun.wait(10)
        time.sleep(0.05)
        order.append("recorded")
        return step

    other = threading.Thread(target=train)
    other.start()
    rows = torch.zeros(2, dtype=torch.long)
    RecordedSteps(lambda *args: torch.zeros(16, 3)[:4], record, WIDTH, torch.empty(4, 3))(rows, rows, rows, 32)
    other.join()
    assert order == ["recorded", "backward"]
    waits = [Passes.score_row, Passes.backward, MasterOptimizer.step]
    assert all(hasattr(function, "__wrapped__") for function in waits)


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
