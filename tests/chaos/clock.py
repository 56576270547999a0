"""Real threads under one seeded clock: one runs at a time, and a random generator says which goes on where several could.

`Simulation` stands in for the modules ``threading`` and ``time`` in the code that is tried. A thread is left only where it
waits (a lock, a condition, a sleep, a join), so a seed names the whole course of events. Time passes only while all wait.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class Deadlock(AssertionError):
    """All threads wait, and nothing will ever wake one."""


class _Ended(BaseException):
    """Takes a thread apart whose simulation is over."""


class SimThread:
    """One thread of the simulation; it has the interface of `threading.Thread`."""

    def __init__(self, simulation: Simulation, target: Callable[..., None], args: Any = (), **_: Any) -> None:
        self._simulation, self._target, self._args = simulation, target, args
        self.baton = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.until = math.inf
        self.error: BaseException | None = None

    def start(self) -> None:
        self._simulation.threads.append(self)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self.baton.acquire()
        try:
            if not self._simulation.over:
                self._target(*self._args)
        except _Ended:
            pass
        except BaseException as error:
            self.error = error
        self._simulation.leave(self)

    def join(self, timeout: float | None = None) -> None:
        self._simulation.wait(lambda: self not in self._simulation.threads, timeout)


class SimLock:
    """`threading.Lock`."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation, self.holder = simulation, None

    def __enter__(self) -> bool:
        self._simulation.wait(lambda: self.holder is None)
        self.holder = self._simulation.current
        return True

    def __exit__(self, *_: object) -> None:
        self.holder = None


class SimCondition(SimLock):
    """`threading.Condition`: whoever waits goes on only after a notification, as with the real one."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self._told = 0

    def notify_all(self) -> None:
        assert self.holder is self._simulation.current, "notified without the lock"
        self._told += 1

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        assert self.holder is self._simulation.current, "waits without the lock"
        end = math.inf if timeout is None else self._simulation.now + timeout
        while not (found := predicate()) and self._simulation.now < end:
            seen, self.holder = self._told, None
            self._simulation.wait(lambda seen=seen: self._told > seen, end - self._simulation.now)  # type: ignore[misc]
            self._simulation.wait(lambda: self.holder is None)
            self.holder = self._simulation.current
        return found


class Simulation:
    """The clock, and which thread runs."""

    def __init__(self, seed: int) -> None:
        self.rng, self.now, self.over = random.Random(seed), 0.0, False
        self.main = SimThread(self, lambda: None)
        self.threads = [self.main]
        self.current = self.main
        self.switches = 0

    @property
    def threading(self) -> Any:
        return SimpleNamespace(
            Thread=lambda **options: SimThread(self, **options),
            Lock=lambda: SimLock(self),
            Condition=lambda: SimCondition(self),
        )

    @property
    def time(self) -> Any:
        return SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        """Let time pass for the thread that runs."""
        self.wait(lambda: False, seconds)

    def wait(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """The running thread waits until ``ready``, or so long; others run meanwhile."""
        me = self.current
        me.ready, me.until = ready, math.inf if timeout is None else self.now + timeout
        self._pass_on()
        me.baton.acquire()
        if self.over and me is not self.main:
            raise _Ended
        if self._stuck:
            raise Deadlock(f"all {len(self.threads)} threads wait at {self.now:.1f} s")
        return ready()

    _stuck = False

    def _pass_on(self) -> None:
        """Wake one of those that can go on, after letting time pass where none can."""
        self.switches += 1
        able = [t for t in self.threads if t.ready() or t.until <= self.now]
        if not able:
            self.now = min((t.until for t in self.threads), default=math.inf)
            able = [t for t in self.threads if t.until <= self.now and self.now < math.inf]
        self._stuck = not able
        self.current = self.rng.choice(able) if able else self.main
        self.current.baton.release()

    def leave(self, thread: SimThread) -> None:
        """A thread has ended."""
        self.threads.remove(thread)
        if not self.over:
            self._pass_on()

    def end(self) -> None:
        """Take apart the threads that are left."""
        self.over = True
        for thread in self.threads:
            if thread is not self.main:
                thread.baton.release()
