"""Runs a model's programs, each in a child process that can only compute, for a limited time.

The process (`e3rl.environments.jail`) has no network, can read only Python's standard library, writes no file, starts no process,
and is killed at its deadline or when it prints too much. If bubblewrap is installed and works, it also runs in empty
namespaces.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from e3rl.environments import jail
from e3rl.errors import UserError

_START = 10.0  # seconds for the process to start and to confine itself, before its time counts
_CHUNK = 65536
_MOST_INPUT = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one program: seconds of wall clock, bytes of memory, and bytes of each of its outputs."""

    seconds: float = 5.0
    memory: int = 512 * 2**20
    output: int = 2**16


@dataclass(frozen=True, slots=True)
class Ran:
    """What a program did. ``stopped`` says why it was ended ('time', 'output'); ``values``: ``repr`` of each call's value."""

    stdout: str
    stderr: str
    values: tuple[str, ...]
    status: int
    stopped: str | None
    seconds: float

    @property
    def failure(self) -> str | None:
        """Why the program failed, in a few words; None if it did not."""
        if self.stopped is not None:
            return {"time": "took too long", "output": "printed too much"}[self.stopped]
        if self.status == 0:
            return None
        if self.status < 0:
            return f"was ended by {signal.Signals(-self.status).name}"
        lines = self.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit status {self.status}"


class SandboxUnavailable(UserError):
    """Programs can't be confined on this machine."""


def run_program(source: str, *, stdin: str = "", calls: Sequence[str] = (), limits: Limits | None = None) -> Ran:
    """Run a Python program, then evaluate ``calls`` in its namespace. Raises `SandboxUnavailable` if it can't be confined."""
    limits = limits or Limits()
    job = {"source": source, "stdin": stdin, "calls": list(calls), "memory": limits.memory, "seconds": limits.seconds}
    text = json.dumps(job).encode()
    if len(text) > _MOST_INPUT:
        raise UserError(f"a program and its input of {len(text)} bytes; at most {_MOST_INPUT} are run")
    return _Run(_bubblewrap(), text, limits).finish()


def _command() -> list[str]:
    executable = getattr(sys, "_base_executable", None) or sys.executable
    return [executable, "-I", "-S", "-B", jail.__file__]


@functools.cache
def _bubblewrap() -> tuple[str, ...]:
    """Arguments that put a command into empty namespaces; none if bubblewrap is missing or may not create them."""
    program = shutil.which("bwrap")
    if program is None:
        return ()
    arguments = bubblewrap_arguments(program)
    done = subprocess.run([*arguments, *_command()[:1], "-I", "-S", "-c", ""], capture_output=True, check=False)
    return tuple(arguments) if done.returncode == 0 else ()


def bubblewrap_arguments(program: str) -> list[str]:
    """The files visible inside: Python, its libraries and this package's jail, all read-only, an empty /proc and /dev."""
    shown = {*jail.readable(), str(Path(_command()[0]).resolve()), _command()[0], jail.__file__}
    shown = {path for path in shown if not path.startswith("/dev/")}
    binds = [part for path in sorted(shown) for part in ("--ro-bind", path, path)]
    return [
        program,
        "--unshare-all",
        "--die-with-parent",
        *binds,
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--chdir",
        "/",
        "--",
    ]


class _Run:
    """One process from its start to its end."""

    def __init__(self, prefix: Sequence[str], job: bytes, limits: Limits) -> None:
        self._limits, self._job, self._wrapped = limits, job, bool(prefix)
        values_out, values_in = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*prefix, *_command(), str(values_in)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[values_in],
                env={"LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            )
        except BaseException:
            os.close(values_out)
            raise
        finally:
            os.close(values_in)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._names = {
            self._process.stdout.fileno(): "stdout",
            self._process.stderr.fileno(): "stderr",
            values_out: "values",
        }
        self._values_out = values_out
        self._got = {"stdout": bytearray(), "stderr": bytearray(), "values": bytearray()}
        self._began: float | None = None  # when it was ready

    def finish(self) -> Ran:
        """Write its input, read its outputs, and always end it."""
        try:
            with contextlib.suppress(BrokenPipeError):
                assert self._process.stdin is not None
                self._process.stdin.write(self._job)
                self._process.stdin.close()
            stopped = self._read()
        finally:
            self._process.kill()
            status = self._process.wait()
            os.close(self._values_out)
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
                with contextlib.suppress(BrokenPipeError):
                    assert stream is not None
                    stream.close()
        values = bytes(self._got["values"])
        if not values.startswith(jail.READY):
            why = values[1:].decode(errors="replace") or bytes(self._got["stderr"]).decode(errors="replace")[-300:]
            raise SandboxUnavailable(
                f"programs can't be run safely on this machine: {why or 'the sandbox did not start'}"
            )
        lines = values[1:].decode(errors="replace").splitlines()
        if self._wrapped and status - 128 in set(signal.Signals):  # bubblewrap passes a signal on as a shell does
            status = 128 - status
        out, err = (bytes(self._got[name]).decode(errors="replace") for name in ("stdout", "stderr"))
        seconds = time.monotonic() - (self._began or time.monotonic())
        return Ran(out, err, tuple(lines), status, stopped, seconds)

    def _read(self) -> str | None:
        """Read all outputs to the end and return why they were cut short, if so. The process then has a moment to exit."""
        opened, started = set(self._names), time.monotonic()
        while opened:
            deadline = started + _START if self._began is None else self._began + self._limits.seconds
            left = deadline - time.monotonic()
            if left <= 0:
                return "time"
            readable = select.select(list(opened), [], [], left)[0]
            for descriptor in sorted(readable, key=lambda d: d != self._values_out):  # the ready signal first
                chunk = os.read(descriptor, _CHUNK)
                if not chunk:
                    opened.remove(descriptor)
                    continue
                kept = self._got[self._names[descriptor]]
                kept += chunk
                if self._began is None and self._got["values"]:
                    self._began = time.monotonic()
                if len(kept) > self._limits.output:
                    del kept[self._limits.output :]
                    return "output"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, (self._began or started) + self._limits.seconds - time.monotonic()))
            return None
        return "time"
