"""Processes of a rehearsal: run to their end, or killed in the middle, timed and named."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from e3rl.errors import UserError
from e3rl.model_files import hub_silent

SECONDS = 900
"""How long one process may take."""


@dataclass(frozen=True)
class Stage:
    """One process of a rehearsal: what ran, and how it ended."""

    name: str
    command: str
    seconds: float
    outcome: str


@dataclass
class Stages:
    """Runs processes in ``directory``, announces each and records its outcome."""

    directory: Path
    say: Callable[[str], None]
    done: list[Stage] = field(default_factory=list)

    def run(self, name: str, command: Sequence[str]) -> str:
        """Run a command; returns its output. UserError, with its last lines, if it fails."""
        self.say(f"{name}: {short(command)}")
        began = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=self.directory,
                env=_environment(),
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"rehearsal: {name} had not ended after {SECONDS} s: {short(command)}") from None
        if done.returncode:
            raise UserError(f"rehearsal: {name} failed: {short(command)}\n{_last_lines(done.stdout + done.stderr)}")
        self.add(name, command, began, "ended well")
        return done.stdout

    def run_until_saved(self, name: str, command: Sequence[str], run: Path) -> None:
        """Train until the second step is saved, then kill its whole process group."""
        self.say(f"{name}: {short(command)}")
        began, log, saved = time.monotonic(), self.directory / "killed.log", run / "checkpoints" / "step-000002"
        with log.open("w") as output:
            process = self._start(command, stdout=output, stderr=output)
            try:
                while not saved.is_dir() and process.poll() is None:
                    if time.monotonic() - began > SECONDS:
                        raise UserError(f"rehearsal: {name} had not saved its second step after {SECONDS} s")
                    time.sleep(0.05)
            finally:
                _kill(process)
        if not saved.is_dir():
            raise UserError(
                f"rehearsal: {name} failed: {short(command)}\n{_last_lines(log.read_text(errors='replace'))}"
            )
        self.add(name, command, began, "killed (SIGKILL) after step 2")

    @contextlib.contextmanager
    def serving(self, name: str, command: Sequence[str]) -> Iterator[str]:
        """Run a server during the block; yields the address with which one of its output lines begins."""
        self.say(f"{name}: {short(command)}")
        began, log = time.monotonic(), self.directory / "server.log"
        with log.open("w") as errors:
            server = self._start(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            try:
                assert server.stdout is not None
                address = next((line.split()[0] for line in server.stdout if line.startswith("http://")), None)
                if address is None:
                    raise UserError(
                        f"rehearsal: the {name} did not start\n{_last_lines(log.read_text(errors='replace'))}"
                    )
                yield address
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(30)
                _kill(server)
        self.add(name, command, began, "served the run")

    def add(self, name: str, command: Sequence[str], began: float, outcome: str) -> None:
        """Record a process that has ended."""
        self.done.append(Stage(name, short(command), time.monotonic() - began, outcome))

    def _start(self, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
            command, cwd=self.directory, env=_environment(), start_new_session=True, **options
        )


def stages_table(stages: Sequence[Stage]) -> list[str]:
    """A line for each process."""
    width = max([34, *(len(stage.name) + 2 for stage in stages)])
    head = [f"{'process':{width}}{'seconds':>8}  outcome"]
    return head + [f"{s.name:{width}}{s.seconds:8.1f}  {s.outcome}" for s in stages]


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment() -> dict[str, str]:
    hub_silent()  # then processes use their caches
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def short(command: Sequence[str]) -> str:
    """A command for display, without directories."""
    return " ".join(
        "python" if part == sys.executable else "…" if "import " in part else Path(part).name if "/" in part else part
        for part in command
    )


def _last_lines(text: str) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][-12:])
