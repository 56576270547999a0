"""Environments in child processes that can be killed: a tool that hangs or crashes costs one trajectory.

This contains accidents, not attacks: the environment's code is the user's, and has the user's rights.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from multiprocessing.connection import Connection
from typing import Any

from e3rl.errors import UserError

_START = 60.0  # seconds for a process to start and to import what the factory needs
_LONGEST = 2**24  # bytes of a reply


class HostLost(Exception):
    """The process is gone, or was killed for taking too long. The message continues "its environment …"."""


class ToolError(Exception):
    """What user code raised in its own process. ``kind``: the class of that."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class IsolatedHost:
    """One environment's process: the methods of `e3rl.environments.tools.Host`, each within ``patience`` seconds."""

    def __init__(self, connection: Connection, patience: float) -> None:
        self._connection, self._patience = connection, patience
        self._finalizer: weakref.finalize[..., IsolatedHost] = weakref.finalize(self, connection.close)
        pid = int(self._receive(_START)["pid"])
        self._finalizer = weakref.finalize(self, _kill, connection, pid, os.getpid())

    def reset(self, row: dict[str, Any]) -> str:
        """The environment's first text."""
        return str(self._ask("reset", row))

    def call(self, tool: str, arguments: str) -> str:
        """What a tool returns, as text; `ToolError` for what it raises."""
        return str(self._ask("call", tool, arguments))

    def mark(self) -> None:
        """`e3rl.environments.tools.Host.mark`."""
        self._ask("mark")

    def compare(self) -> None:
        """`e3rl.environments.tools.Host.compare`."""
        self._ask("compare")

    def save(self) -> None:
        """Save the current state."""
        self._ask("save")

    def go_back(self) -> None:
        """Restore the last saved state."""
        self._ask("go_back")

    def get_reward(self) -> Any:
        """The result of the environment's ``get_reward``; None without one, or if its process has ended before."""
        return self._ask("reward") if self._finalizer.alive else None

    @property
    def instance(self) -> Any:
        """The object that reward functions get as the environment: it has only `get_reward`."""
        return self

    def close(self) -> None:
        """End the process."""
        self._finalizer()

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            self._connection.send((method, arguments))
        except OSError:
            raise HostLost("has lost its process") from None
        reply = self._receive(self._patience)
        if "refused" in reply:
            raise UserError(reply["refused"])
        if "error" in reply:
            raise ToolError(reply["error"], reply["kind"])
        return reply["value"]

    def _receive(self, seconds: float) -> dict[str, Any]:
        try:
            if not self._connection.poll(seconds):
                self.close()
                raise HostLost(f"took longer than {seconds:g} s")
            reply = json.loads(self._connection.recv_bytes(_LONGEST))
            return dict(reply)
        except (EOFError, OSError, ValueError, TypeError):
            self.close()
            raise HostLost("ended its process, or answered with more than it may") from None


def _kill(connection: Connection, pid: int, owner: int) -> None:
    if os.getpid() == owner:  # a forked copy of the trainer must not end them
        for end in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                end(pid, signal.SIGKILL)
        connection.close()


class HostProcesses:
    """A process that has loaded a factory, started when first needed, and the processes that it forks. Threads share it."""

    def __init__(self, factory: str, patience: float, *, deep: bool, kind: str = "") -> None:
        self._told = {"path": sys.path, "factory": factory, "kind": kind, "deep": deep}
        self._factory, self._patience, self._lock = factory, patience, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def open(self) -> IsolatedHost:
        """A process with a fresh environment. UserError if the factory can't be loaded there."""
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            for _ in range(2):  # a process that has died since is replaced
                control = self._started()
                try:
                    socket.send_fds(control, [b"1"], [theirs.fileno()])
                    break
                except OSError:
                    self._stop()
        return IsolatedHost(Connection(ours.detach()), self._patience)

    def _started(self) -> socket.socket:
        if self._control is not None:
            return self._control
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "e3rl.environments.isolated", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        weakref.finalize(self, _end, self._process, self._control, os.getpid())
        self._control.settimeout(_START)
        self._control.sendall(json.dumps(self._told).encode() + b"\n")
        try:
            ready = self._control.recv(1)
        except TimeoutError:
            ready = b""
        if not ready:
            self._stop()
            raise UserError(
                f"environment '{self._factory}' can't be loaded in a process of its own (environments.isolate)"
            )
        return self._control

    def _stop(self) -> None:
        if self._process is not None and self._control is not None:
            _end(self._process, self._control, os.getpid())
        self._process = self._control = None


def _end(process: subprocess.Popen[bytes], control: socket.socket, owner: int) -> None:
    if os.getpid() == owner:
        control.close()
        process.kill()
        process.wait()
