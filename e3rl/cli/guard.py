"""Runs the command in a child process and reports exits that the child can't report itself (Ray).

A process connected to a Ray cluster exits at once, silently and with code 1, when it touches the object store of a node
whose Ray is gone. No handler runs and no error can be caught.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from e3rl.errors import UserError
from e3rl.plugins import own_python

_POST = "E3RL_GUARDED"
_SECONDS_TO_END = 60.0  # after the command has finished, for the exit handlers of libraries
_PR_SET_PDEATHSIG = 1


def guarded(arguments: Sequence[str]) -> int:
    """Run ``e3rl arguments`` in a child; returns its exit code. UserError if the child ended without reporting one."""
    read, write = os.pipe()
    command = [*own_python("e3rl"), *arguments]
    environment = {**os.environ, _POST: str(write)}
    child = subprocess.Popen(command, env=environment, pass_fds=(write,), process_group=0)
    os.close(write)

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while child.poll() is None and not _readable(read, 1.0):
            pass
        code = os.read(read, 8).decode() if _readable(read, 0.0) else ""
        ended = _end(child)
    finally:
        os.close(read)
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        return int(code)
    how = f"exit code {ended}" if ended >= 0 else f"signal {-ended}"
    raise UserError(
        f"the run's process ended without an error message ({how}). Ray does this when the head node of its cluster, or "
        "Ray's own process on this machine, is gone. The run's state is in its newest checkpoint: when there is a cluster "
        "again, continue with the same command and --resume (rollout.address and the numbers of workers may differ)"
    )


def _readable(descriptor: int, seconds: float) -> bool:
    return bool(select.select([descriptor], [], [], seconds)[0])


def _end(child: subprocess.Popen[bytes]) -> int:
    try:
        return child.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


class Post:
    """The child's side: reports the command's exit code to the guard."""

    def __init__(self) -> None:
        number = os.environ.pop(_POST, "")
        self.guarded = bool(number)
        self._descriptor = int(number or -1)
        if self.guarded:
            os.set_inheritable(self._descriptor, False)
            if sys.platform == "linux":  # a killed guard must also end the run
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def left(self, code: int) -> int:
        """Report the exit code to the guard, and return it."""
        if self.guarded:
            os.write(self._descriptor, f"{code}\n".encode())
        return code
