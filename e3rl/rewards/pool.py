"""Persistent worker processes that can be killed: whatever a task does, the call returns in time.

A thread can't be interrupted and `concurrent.futures` can't kill one process of its pool, so each worker here is a
plain child process with a pipe. The parent waits for replies up to a deadline, then kills the child and starts another.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from e3rl.errors import UserError

GRACE = 1.0
"""Seconds after the time limit in which the worker can interrupt itself before it is killed."""

START_LIMIT = 60.0
"""Seconds that a worker may take to start and to import what its task names; not counted as the task's time."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A task's value, or the error."""

    value: Any = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class PooledCall:
    """``target`` (``module:name``) called with ``arguments``; ``memory`` bounds its address space in bytes.

    With ``setup``, the target is first called with it, once a worker and outside the time limit, and returns the
    function to use.
    """

    target: str
    arguments: Mapping[str, Any]
    memory: int | None = None
    setup: str | None = None


class _Worker:
    """One child process and what it is doing."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-P", "-m", "e3rl.rewards.worker", str(theirs.fileno())]
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C goes to the parent only, and a kill includes the task's own child processes
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        self.connection.send(sys.path)
        self.index: int | None = None
        self.deadline = 0.0

    def begin(self, index: int, task: PooledCall, seconds: float) -> None:
        """Send a task; its time starts when the worker reports that it began."""
        self.index, self.deadline = index, time.monotonic() + START_LIMIT
        self.connection.send((task.target, task.setup, dict(task.arguments), seconds, task.memory))

    def kill(self) -> int:
        """Kill and reap the process; returns its exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        return self.process.wait()


def _kill_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:  # a forked copy of the parent must not end the workers
        while workers:
            workers.pop().kill()


class ProcessPool:
    """Up to ``workers`` processes, started when first needed; each task may take ``timeout`` seconds."""

    def __init__(self, workers: int, timeout: float) -> None:
        self._size, self.timeout = workers, timeout
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, os.getpid())
        self.restarts = 0

    @property
    def pids(self) -> list[int]:
        """Process ids of the live workers."""
        return [worker.process.pid for worker in self._workers]

    def map(self, tasks: Sequence[PooledCall]) -> list[Outcome]:
        """The outcome of every task, in order. A task whose worker dies is tried once more; one out of time is not."""
        if not self._finalizer.alive:
            raise UserError("the reward workers are closed; make a new scorer")
        with self._lock:
            return _MapCall(self, tasks).run()

    def close(self) -> None:
        """End all workers."""
        self._finalizer()


class _MapCall:
    """The state of one `ProcessPool.map`: waiting tasks, running tasks and outcomes."""

    def __init__(self, pool: ProcessPool, tasks: Sequence[PooledCall]) -> None:
        self._pool, self._tasks = pool, tasks
        self._waiting = deque(range(len(tasks)))
        self._deaths = [0] * len(tasks)
        self._outcomes: dict[int, Outcome] = {}

    def run(self) -> list[Outcome]:
        try:
            while len(self._outcomes) < len(self._tasks):
                self._assign()
                self._listen()
        except BaseException:  # interrupted half-way: a worker that still computes must not answer the next batch
            self._retire(self._busy())
            raise
        return [self._outcomes[i] for i in range(len(self._tasks))]

    def _busy(self) -> list[_Worker]:
        return [w for w in self._pool._workers if w.index is not None]

    def _assign(self) -> None:
        """Give waiting tasks to idle workers, starting workers up to the pool's size."""
        workers = self._pool._workers
        idle = [w for w in workers if w.index is None]
        while self._waiting and (idle or len(workers) < self._pool._size):
            if not idle:
                workers.append(_Worker())
                idle.append(workers[-1])
            worker, index = idle.pop(), self._waiting.popleft()
            try:
                worker.begin(index, self._tasks[index], self._pool.timeout)
            except OSError:  # it died while idle; its end of the pipe is closed
                self._died(worker)
            except Exception as error:  # arguments that can't be pickled
                worker.index = None
                self._outcomes[index] = Outcome(error=f"can't be sent to a worker: {error}")

    def _listen(self) -> None:
        """Wait for the next reply or deadline, and act on all that are due."""
        busy = self._busy()
        if not busy:
            return
        patience = max(0.0, min(w.deadline for w in busy) - time.monotonic())
        ready = set(wait([w.connection for w in busy], patience))
        for worker in busy:
            if worker.connection in ready:
                self._receive(worker)
            elif time.monotonic() >= worker.deadline:
                self._expired(worker)

    def _receive(self, worker: _Worker) -> None:
        try:
            reply = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            self._died(worker)
            return
        if reply.get("started"):
            worker.deadline = time.monotonic() + self._pool.timeout + GRACE
            return
        assert worker.index is not None
        self._outcomes[worker.index] = Outcome(reply.get("value"), reply.get("error"))
        worker.index = None

    def _expired(self, worker: _Worker) -> None:
        assert worker.index is not None
        self._outcomes[worker.index] = Outcome(
            error=f"took longer than {self._pool.timeout:g} s; its worker was killed"
        )
        self._retire([worker])

    def _died(self, worker: _Worker) -> None:
        index = worker.index
        assert index is not None
        (status,) = self._retire([worker])
        self._deaths[index] += 1
        if self._deaths[index] == 1:
            self._waiting.appendleft(index)
        else:
            self._outcomes[index] = Outcome(error=f"the worker died twice ({_cause(status)})")

    def _retire(self, workers: Sequence[_Worker]) -> list[int]:
        for worker in workers:
            self._pool._workers.remove(worker)
        self._pool.restarts += len(workers)
        return [worker.kill() for worker in workers]


def _cause(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
