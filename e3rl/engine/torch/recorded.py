"""Decode steps recorded once and played back: on a GPU a CUDA graph, which spares launching a thousand small kernels.

A recording is of one shape (rows, positions read) over fixed buffers. Rows are rounded up to multiples of 16 and widths
to multiples of 256, so that few shapes occur; the latest `MOST` are kept. All work in the same memory, as large as the
largest needs: logits go to a buffer of their own, so nothing in that memory outlives a step.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

ROWS, WIDTH = 16, 256

MOST = 64
"""Recordings kept. Each takes a few MB of driver memory beside the shared pool."""

P = ParamSpec("P")
R = TypeVar("R")

_ALLOCATING = threading.RLock()


def allocates(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator for code of other threads that allocates on the device: it waits while a step is being recorded."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with _ALLOCATING:
            return function(*args, **kwargs)

    return alone


Step = Callable[[], Tensor]
"""A step over fixed buffers: what it reads is written there beforehand."""

Recorder = Callable[[Step], Step]
"""Runs a step once to record it, and gives back what plays the recording."""


class TensorStep(Protocol):
    """A decode step of tensors alone (`e3rl.engine.torch.fused.FusedSlotModel.step`)."""

    def __call__(self, ids_R: Tensor, positions_R: Tensor, slots_R: Tensor, width: int, first: int = 0) -> Tensor: ...


class CudaGraphs:
    """Records steps as CUDA graphs that share one pool of memory. They must not be played at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, step: Step) -> Step:
        """Record ``step``."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # warm-up: allocations and kernel choices of a first run must not be recorded
            step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = step()

        def play() -> Tensor:
            graph.replay()
            return result

        return play


def _rounded(size: int, multiple: int, most: int) -> int:
    return min(-(-size // multiple) * multiple, most)


class RecordedSteps:
    """Recordings of a decode step by shape, made when a shape is first met.

    ``logits_SV`` is the buffer of what a step returns, overwritten by the next step, with a row for each of the slots in memory;
    these have ``capacity`` positions. The weights that a step reads must stay where they are.
    """

    def __init__(self, step: TensorStep, record: Recorder, capacity: int, logits_SV: Tensor) -> None:
        self._step, self._record = step, record
        self._slots, self._capacity, self._logits_SV = len(logits_SV), capacity, logits_SV
        slots, device = self._slots, logits_SV.device
        self._ids, self._positions, self._targets = (
            torch.zeros(slots, dtype=torch.long, device=device) for _ in range(3)
        )
        self._recordings: OrderedDict[tuple[int, int, int], Step] = OrderedDict()

    def __call__(self, ids_R: Tensor, positions_R: Tensor, slots_R: Tensor, width: int, first: int = 0) -> Tensor:
        """Logits [R, V] of the step."""
        live = len(ids_R)
        shape = (_rounded(live, ROWS, self._slots - first), _rounded(width, WIDTH, self._capacity), first)
        self._ids[:live], self._positions[:live], self._targets[:live] = ids_R, positions_R, slots_R
        self._targets[live:] = self._slots - 1  # the scratch slot
        if shape not in self._recordings:
            if len(self._recordings) == MOST:
                self._recordings.popitem(last=False)
            self._recordings[shape] = self._recording(*shape)
        self._recordings.move_to_end(shape)
        return self._recordings[shape]()[:live]

    @allocates
    def _recording(self, rows: int, width: int, first: int) -> Step:
        ids_R, positions_R, slots_R = self._ids[:rows], self._positions[:rows], self._targets[:rows]
        logits_RV = self._logits_SV[:rows]
        return self._record(lambda: logits_RV.copy_(self._step(ids_R, positions_R, slots_R, width, first)))
