"""A training worker: the process of one rank, as a Ray actor. It trains as any rank does, and answers while it does."""

from __future__ import annotations

import os
import queue
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from e3rl import __version__
from e3rl.config import Config
from e3rl.train.listeners import Listener, Silent

News = tuple[str, tuple[Any, ...]]
"""An event of a `Listener` and its values."""

Outcome = tuple[Path, Mapping[str, Any]]
"""A run's directory and its summary, which the first rank alone has."""


@dataclass(frozen=True)
class Begin:
    """How a run begins: ``resume`` goes on with one, ``again`` with an unfinished one alone."""

    resume: bool = False
    again: bool = False


class Job(Protocol):
    """What a rank does: the run's directory and summary."""

    def __call__(self, begin: Begin, listener: Listener, on_stop: Callable[[Callable[[], None]], None]) -> Outcome: ...


class Relay(Silent):
    """Buffers the events of a rank's trainer until the starting process asks for them."""

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[News] = queue.SimpleQueue()

    def started(self, run: Path, config: Config, method: str, first_step: int, steps: int) -> None:
        self._told.put(("started", (run.resolve(), config, method, first_step, steps)))

    def progressed(self, activity: str, done: int, of: int) -> None:
        self._told.put(("progressed", (activity, done, of)))

    def stepped(self, record: Mapping[str, Any]) -> None:
        self._told.put(("stepped", (record,)))

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self._told.put(("evaluated", (record,)))

    def noted(self, text: str) -> None:
        self._told.put(("noted", (text,)))

    def finished(self, summary: Mapping[str, Any]) -> None:
        self._told.put(("finished", (summary,)))

    def take(self, seconds: float) -> list[News]:
        """All buffered events; waits a little where there are none."""
        told: list[News] = []
        try:
            told.append(self._told.get(timeout=seconds))
            while True:
                told.append(self._told.get_nowait())
        except queue.Empty:
            return told


class TrainingWorker:
    """A rank's process, as an actor."""

    def __init__(self) -> None:
        self._relay = Relay()
        self._stops: list[Callable[[], None]] = []
        self._asked = False

    def hello(self) -> tuple[str, str, int]:
        """This version, this machine's address, and a port that is free here."""
        import ray

        with socket.create_server(("", 0)) as free:
            return __version__, ray.util.get_node_ip_address(), free.getsockname()[1]

    def train(self, job: Job, begin: Begin, environment: Mapping[str, str], directory: str) -> Outcome:
        """Do the job as the rank that ``environment`` names, where the run was started."""
        os.environ.update(environment)
        if Path(directory).is_dir():
            os.chdir(directory)
        else:
            self._relay.noted(
                f"{directory} is not on the machine of rank {environment['RANK']}: relative paths start at {os.getcwd()} there"
            )
        path, summary = job(begin, self._relay, self._on_stop)
        return path.resolve(), summary

    def _on_stop(self, act: Callable[[], None]) -> None:
        self._stops.append(act)
        if self._asked:
            act()

    def told(self, seconds: float) -> list[News]:
        """See `Relay.take`."""
        return self._relay.take(seconds)

    def stop(self) -> None:
        """Ask the trainer to stop where the run's state is whole."""
        self._asked = True
        for act in self._stops:
            act()

    def end(self) -> None:
        """End this process and with it its locks and ports."""
        os._exit(0)
