"""Decode steps recorded once and played back: on a GPU a CUDA graph, which spares launching a thousand small kernels.

A recording is of one shape (rows, positions read) over fixed buffers. Rows are rounded up to multiples of 16 and widths
to multiples of 256, so that few shapes occur.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

ROWS, WIDTH = 16, 256

Step = Callable[[], Tensor]
"""A step over fixed buffers: what it reads is written there beforehand."""

Recorder = Callable[[Step], Step]
"""Runs a step once to record it, and gives back what plays the recording."""


class TensorStep(Protocol):
    """A decode step of tensors alone (`e3rl.engine.torch.fused.FusedSlotModel.step`)."""

    def __call__(self, ids_R: Tensor, positions_R: Tensor, slots_R: Tensor, width: int, first: int = 0) -> Tensor: ...


def cuda_graph(step: Step) -> Step:
    """Record ``step`` as a CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is allocated or chosen at a first run must not be in the graph
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def play() -> Tensor:
        graph.replay()
        return result

    return play


def _rounded(size: int, multiple: int, most: int) -> int:
    return min(-(-size // multiple) * multiple, most)


class RecordedSteps:
    """Recordings of a decode step by shape, made when a shape is first met.

    ``slots`` and ``capacity`` are those in memory. The weights that a step reads must stay where they are; what it
    returns is overwritten by the next step.
    """

    def __init__(self, step: TensorStep, record: Recorder, slots: int, capacity: int, device: torch.device) -> None:
        self._step, self._record = step, record
        self._slots, self._capacity = slots, capacity
        self._ids, self._positions, self._targets = (
            torch.zeros(slots, dtype=torch.long, device=device) for _ in range(3)
        )
        self._recordings: dict[tuple[int, int, int], Step] = {}

    def __call__(self, ids_R: Tensor, positions_R: Tensor, slots_R: Tensor, width: int, first: int = 0) -> Tensor:
        """Logits [R, V] of the step."""
        live = len(ids_R)
        shape = (_rounded(live, ROWS, self._slots - first), _rounded(width, WIDTH, self._capacity), first)
        self._ids[:live], self._positions[:live], self._targets[:live] = ids_R, positions_R, slots_R
        self._targets[live:] = self._slots - 1  # the scratch slot
        if shape not in self._recordings:
            self._recordings[shape] = self._recording(*shape)
        return self._recordings[shape]()[:live]

    def _recording(self, rows: int, width: int, first: int) -> Step:
        ids_R, positions_R, slots_R = self._ids[:rows], self._positions[:rows], self._targets[:rows]
        return self._record(lambda: self._step(ids_R, positions_R, slots_R, width, first))
