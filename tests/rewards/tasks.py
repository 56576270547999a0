"""Tasks for the worker pool's tests, well-behaved and not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def double(x: int) -> int:
    return 2 * x


def pid() -> int:
    return os.getpid()


def loaded_modules() -> list[str]:
    return sorted(sys.modules)


def fail() -> None:
    raise ValueError("bad input")


def leave() -> None:
    sys.exit(3)


def unserialisable() -> object:
    return object()


def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "slept"


def swallow_exceptions() -> None:
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


def deaf_with_child(file: str) -> None:
    """Deaf to the alarm, like a C call that never returns."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "60"])
    if file:
        Path(file).write_text(str(child.pid))
    time.sleep(60)


def deaf_loop(file: str) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    Path(file).write_text(str(os.getpid()))
    while True:
        pass


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def die_first_time(file: str) -> str:
    if not Path(file).exists():
        Path(file).touch()
        die()
    return "alive"


def allocate(megabytes: int) -> int:
    return len(bytes(megabytes * 2**20)) // 2**20  # zeroed by the kernel, so only the address space is used


def slow_setup(seconds: str) -> Callable[[int], list[int]]:
    time.sleep(float(seconds))
    calls = []

    def function(x: int) -> list[int]:
        calls.append(x)
        return [1, x] if len(calls) == x + 1 else [0, x]

    return function
