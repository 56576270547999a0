"""The n-th call fails, and the power fails: at every position of a small run, one after the other.

    python -m tests.chaos.faults --seconds 120

A call by which a run reads, writes, syncs, renames, maps, starts a process or uses a pipe raises EIO, ENOMEM or EMFILE once:
the run must end as the unharmed one; or with a sentence, and then resume to the same bits. When the power fails, only what was
synced is left, of files and of directories alike: the run must resume to the same bits. EINTR is tried as it happens: a run
that is interrupted by a signal every half millisecond must end as the unharmed one.
"""

from __future__ import annotations

import argparse
import errno
import mmap
import os
import pathlib
import pickle
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from e3rl.train import checkpoint
from tests.chaos.kills import Crash
from tests.chaos.trials import Place, Verdicts, broken, not_the_same

ERRORS = (errno.EIO, errno.ENOMEM, errno.EMFILE)


class _FailingFile:
    """An open file, a write to which may fail."""

    def __init__(self, file: Any, fault: Fault) -> None:
        self._file, self._fault = file, fault

    def write(self, data: Any) -> Any:
        self._fault.check("write to an open file")
        return self._file.write(data)

    def flush(self) -> None:
        self._fault.check("flush")
        self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _FailingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


@dataclass
class Fault(Crash):
    """Raises an error at the n-th call of a kind, once."""

    error: int = errno.EIO

    def check(self, kind: str) -> None:
        """OSError where this call is the one."""
        if self.reached(kind):
            raise OSError(self.error, os.strerror(self.error))

    def _fails(self, owner: Any, name: str, kind: str, wrap: Callable[[Any], Any] = lambda result: result) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.check(kind)
            return wrap(real(*arguments, **options))

        setattr(owner, name, call)

    def install(self) -> None:
        """Wrap the calls, in this process."""
        for owner, name, kind in (
            (os, "fsync", "sync"),
            (os, "replace", "rename"),
            (os, "open", "open"),
            (pathlib.Path, "read_bytes", "read"),
            (pathlib.Path, "read_text", "read"),
            (pathlib.Path, "write_text", "write"),
            (pathlib.Path, "mkdir", "make a directory"),
            (checkpoint, "save_file", "write tensors"),
            (checkpoint, "safe_open", "map tensors"),
            (pq, "write_table", "write rollouts"),
            (mmap, "mmap", "map a file"),
            (subprocess, "Popen", "start a process"),
            (Connection, "send", "use a pipe"),
            (Connection, "recv_bytes", "use a pipe"),
        ):
            self._fails(owner, name, kind)
        self._fails(pathlib.Path, "open", "open", lambda file: _FailingFile(file, self))


class Storm(Crash):
    """Interrupts this process's calls by a signal every half millisecond, from beginning to end."""

    def install(self) -> None:
        signal.signal(signal.SIGALRM, lambda *_: self.calls.update(["signal"]))
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)


@dataclass
class PowerCut(Crash):
    """Ends this process before the n-th sync, and leaves an image of what was synced by then.

    A file's bytes last as they were at its last sync; a name in a directory lasts once the directory was synced.
    """

    root: Path = Path()
    image: Path = Path()
    bytes_of: dict[int, bytes] = field(default_factory=dict)
    names_in: dict[int, dict[str, int]] = field(default_factory=dict)

    def start(self) -> None:
        """All that is there already has lasted."""
        for path in [self.root, *self.root.rglob("*")] if self.root.exists() else []:
            self._note(path)

    def _note(self, path: Path) -> None:
        number = path.stat().st_ino
        if path.is_dir():
            self.names_in[number] = {p.name: p.stat().st_ino for p in path.iterdir()}
        else:
            self.bytes_of[number] = path.read_bytes()

    def install(self) -> None:
        self.start()
        real = os.fsync

        def fsync(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if self.reached("sync"):
                self.image.write_bytes(pickle.dumps((self.root.stat().st_ino, self.bytes_of, self.names_in)))
                self.die()
            real(descriptor)
            if path.is_relative_to(self.root):
                self._note(path)

        os.fsync = fsync


def restore_image(image: Path, root: Path) -> None:
    """Make ``root`` what the power cut left. Files are told from directories by what was synced of them."""
    top, bytes_of, names_in = pickle.loads(image.read_bytes())
    shutil.rmtree(root, ignore_errors=True)

    def make(number: int, path: Path) -> None:
        if number in names_in:
            path.mkdir(parents=True, exist_ok=True)
            for name, inner in names_in[number].items():
                make(inner, path / name)
        elif number in bytes_of:
            path.write_bytes(bytes_of[number])
        else:  # the name lasted, and nothing that it stands for
            path.write_bytes(b"")

    make(top, root)


def try_faults(directory: Path, seconds: float, seed: int = 0, trials: int = 10**6) -> Verdicts:
    """Interrupt a run throughout; then fail calls at random positions, each position once, for so long."""
    end, place, rng = time.monotonic() + seconds, Place(directory), random.Random(seed)
    verdicts = Verdicts()
    wrong = not_the_same(place, "harmed", place.train("harmed", Storm()))
    if not wrong and (signals := place.calls("harmed")["signal"]) < 100:
        wrong = f"interrupted by {signals} signals alone"
    verdicts.add("EINTR", "identical", wrong, place.said("harmed"))
    place.forget("harmed")
    for kind, nth in positions(place, Fault(), rng, trials):
        if time.monotonic() > end:
            break
        error = rng.choice(ERRORS)
        what = f"{kind} {nth}: {errno.errorcode[error]}"
        life, how = place.train("harmed", Fault(kind, nth, error=error)), "identical"
        wrong = broken(life, place.said("harmed"))
        if not wrong and life.status == 2:
            life, how = place.train("harmed"), "a sentence, then resumed: identical"
        verdicts.add(what, how, wrong or not_the_same(place, "harmed", life), place.said("harmed"))
        place.forget("harmed")
    return verdicts


def try_power_cuts(directory: Path, seconds: float, seed: int = 0, trials: int = 10**6) -> Verdicts:
    """Cut the power before syncs in a random order, each once, for so long."""
    end, place, rng = time.monotonic() + seconds, Place(directory), random.Random(seed)
    verdicts, run, image = Verdicts(), place.run("harmed"), directory / "image"
    for kind, nth in positions(place, PowerCut(root=run, image=image), rng, trials):
        if time.monotonic() > end:
            break
        place.train("harmed", PowerCut(kind, nth, root=run, image=image))
        restore_image(image, run)
        wrong = not_the_same(place, "harmed", place.train("harmed"))
        verdicts.add(f"power cut before sync {nth}", "identical", wrong, place.said("harmed"))
        place.forget("harmed")
    return verdicts


def positions(place: Place, counting: Crash, rng: random.Random, most: int) -> Iterator[tuple[str, int]]:
    """Every kind of call and every position of it in an unharmed run, in a random order; ``most`` of them."""
    counting.kind = "count"
    place.forget("harmed")
    if place.train("harmed", counting).status != 0:
        raise RuntimeError(place.said("harmed"))
    calls = place.calls("harmed")
    place.forget("harmed")
    found = [(kind, nth) for kind, often in sorted(calls.items()) for nth in range(1, often + 1)]
    rng.shuffle(found)
    yield from found[:most]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="for failing calls, and again for power cuts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wrong = False
    for name, tried in (("failing calls", try_faults), ("power cuts", try_power_cuts)):
        with tempfile.TemporaryDirectory() as directory:
            verdicts = tried(Path(directory), options.seconds, options.seed)
        print("\n".join(verdicts.lines(name)), flush=True)
        wrong = wrong or bool(verdicts.wrong)
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
