"""A decode step whose rows are divided among threads.

PyTorch divides each operation, which pays where its threads wait awake. Where they sleep (``OMP_WAIT_POLICY=PASSIVE``, or more
threads than cores) one takes 80 microseconds or so to wake, longer than most operations of a small model. There the
rows are divided instead: each part runs its own operations in one thread, and the parts meet once a step. How long
waking takes is measured once. A row's numbers are the same to the last bit either way.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch

from e3rl.engine.torch.storage import PACK

PART_ROWS = 12
"""Fewest rows of a part: fewer don't pay for a thread."""

MOST_PARTS = 8
"""Beyond this, threads mostly wait for Python's lock."""

_ASLEEP = 2e-5
"""Seconds to wake a thread from which the rows are divided in place of the operations."""

_PRODUCTS_PER_SECOND = 5e10
"""Multiplications of one thread, roughly."""


class Division(NamedTuple):
    """How many parts a step is divided into, and how many threads each operation of a part uses."""

    parts: int
    threads: int


def division(rows: int, weight_entries: int, threads: int, wake_s: float) -> Division:
    """The fastest division of ``rows`` among ``threads`` that take ``wake_s`` to wake, for weights of that many entries."""
    parts = max(1, min(threads, rows // PART_ROWS, MOST_PARTS)) if wake_s > _ASLEEP else 1
    saved_s = rows * weight_entries / parts / _PRODUCTS_PER_SECOND / 2
    return Division(parts, threads // parts if saved_s > wake_s else 1)


@functools.cache
def wake_seconds(threads: int) -> float:
    """Median cost, in seconds, of dividing an operation among ``threads`` in this process."""
    if threads == 1:
        return 0.0
    taken = []
    with torch.inference_mode(), operation_threads(threads):
        x = torch.zeros(threads * 2**15)  # the least that PyTorch divides
        for _ in range(51):
            began = time.perf_counter()
            x.neg_()
            taken.append(time.perf_counter() - began)
    return sorted(taken)[25]


def divided(rows: int, parts: int) -> list[slice]:
    """``rows`` in at most ``parts`` of about the same size; all but the last are multiples of `PACK`."""
    size = -(-rows // (parts * PACK)) * PACK
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def passes(lengths: Sequence[int], threads: int, most: int) -> list[slice]:
    """Prompts of these lengths in passes of about the same number of tokens, some for each thread; of at most ``most`` tokens
    where they hold more than one prompt."""
    of_each = -(-sum(lengths) // (threads * most))
    size, found, start, tokens = -(-sum(lengths) // (threads * of_each)), list[slice](), 0, 0
    for index, length in enumerate(lengths):
        if index > start and tokens + length > size:
            found.append(slice(start, index))
            start, tokens = index, 0
        tokens += length
    return [*found, slice(start, len(lengths))]


class Pace:
    """Lets all parts stop after the same step: the last one planned, or one in which a request of any part ended.

    Once ``interrupted`` is set, the step in progress is the last.
    """

    def __init__(self, parts: int, steps: int, interrupted: threading.Event | None = None) -> None:
        self._barrier = threading.Barrier(parts)
        self._last = steps
        self._interrupted = interrupted or threading.Event()

    def over(self, step: int, ended: bool) -> bool:
        """Wait until all parts have made ``step``; whether it was the last."""
        if ended or self._interrupted.is_set():
            self._last = min(self._last, step)
        self._barrier.wait()
        return step >= self._last

    def __enter__(self) -> None:
        """A part begins."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        """A part ends. Where it failed, the others stop at their current step without an error of their own."""
        if kind is not None and issubclass(kind, threading.BrokenBarrierError):
            return True
        if error is not None:
            self._barrier.abort()
        return False


class Crew:
    """A thread pool of one engine, so that a part never waits for a free thread."""

    def __init__(self) -> None:
        self._helpers = ThreadPoolExecutor(MOST_PARTS - 1, thread_name_prefix="e3rl-decoding")

    @contextmanager
    def beside(self, tasks: Sequence[Callable[[], None]], threads: int) -> Iterator[None]:
        """Run ``tasks`` while the calling thread runs the body, each operation with ``threads`` threads.

        Ends when all have ended; raises the first failure of a task where the body has none.
        """
        others = [self._helpers.submit(_run, task, threads) for task in tasks]
        try:
            with operation_threads(threads):
                yield
        finally:
            failures = [failure for other in others if (failure := other.exception())]
        if failures:
            raise failures[0]


@torch.inference_mode()
def _run(task: Callable[[], None], threads: int) -> None:
    with operation_threads(threads):
        task()


@contextmanager
def operation_threads(threads: int) -> Iterator[None]:
    """Operations of the calling thread use ``threads`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
