"""The child side of `e3rl.rewards.pool`: one task at a time, in the main thread, each under a time and memory limit.

Run as ``python -m e3rl.rewards.worker DESCRIPTOR``. It imports the standard library and what a task names.
"""

from __future__ import annotations

import importlib
import json
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from e3rl.errors import UserError, where_raised

_ORPHAN_FACTOR = 20  # CPU seconds, in units of the time limit, after which the kernel ends an orphaned worker


class _Expired(BaseException):
    """The time limit passed. Not an Exception, so that ``except Exception`` does not catch it."""


def _expire(signum: int, frame: FrameType | None) -> None:
    raise _Expired


def _arm(seconds: float) -> None:
    """Interrupt Python code after ``seconds``; a C call that never returns is ended by the parent or the kernel."""
    signal.signal(signal.SIGALRM, _expire)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, _ORPHAN_FACTOR * seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _disarm() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory(limit: int | None) -> None:
    """Limit the address space; only the soft limit is set, so that the next task may have another one."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard if limit is None else limit, hard))


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}{where_raised(error)}"


def _call(function: Callable[..., Any], arguments: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    try:
        try:
            _arm(seconds)
            return {"value": function(**arguments)}
        finally:
            _disarm()
    except _Expired:
        return {"error": f"took longer than {seconds:g} s"}
    except MemoryError:
        return {"error": "ran out of its memory limit"}
    except BaseException as error:  # SystemExit too: a task must not end the worker
        return {"error": _describe(error)}


def _load(target: str, setup: str | None) -> Callable[..., Any]:
    """The function that a task names; with ``setup``, the function that it returns for it."""
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    return function if setup is None else function(setup)


def _encode(reply: dict[str, Any]) -> bytes:
    try:
        return json.dumps(reply).encode()
    except (TypeError, ValueError) as error:
        return json.dumps({"error": f"returned what is no plain value: {error}"}).encode()


def serve(connection: Connection) -> None:
    """Answer tasks until the pipe closes: ``{"started": true}``, then ``{"value": …}`` or ``{"error": …}``."""
    loaded: dict[tuple[str, str | None], Callable[..., Any]] = {}
    sys.path[:] = connection.recv()
    while True:
        try:
            target, setup, arguments, seconds, memory = connection.recv()
        except EOFError:
            return
        _limit_memory(None)
        try:
            function = loaded[target, setup] = loaded.get((target, setup)) or _load(target, setup)
        except Exception as error:  # a user's module may fail in any way while it is imported
            connection.send_bytes(_encode({"error": _describe(error)}))
            continue
        _limit_memory(memory)
        connection.send_bytes(_encode({"started": True}))
        connection.send_bytes(_encode(_call(function, arguments, seconds)))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
