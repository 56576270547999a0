"""Runs cells as processes, several at a time; what is done is not done again, and what fails is named."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from e3rl.errors import UserError
from e3rl.files import write_json
from e3rl_reproduce.cells import ERROR, Cell, merged, missing

LOG = "log.txt"


@dataclass(frozen=True)
class Failure:
    """A cell that did not come to its end, and the last line that it said."""

    cell: Cell
    reason: str


def _threads(jobs: int) -> dict[str, str]:
    """Each process its share of the cores; waiting threads must not spin."""
    share = str(max(1, (os.cpu_count() or 1) // jobs))
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", share), "OMP_WAIT_POLICY": "PASSIVE"}


def _run(cells: Sequence[Cell], out: Path, launcher: Sequence[str], jobs: int) -> list[Failure]:
    """Run cells in one process, one after the other."""
    directories = [cell.directory(out) for cell in cells]
    for cell, directory in zip(cells, directories, strict=True):
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "cell.json", cell.to_table())
        (directory / ERROR).unlink(missing_ok=True)
    command = [*launcher, sys.executable, "-m", "e3rl_reproduce.worker", *(str(d.resolve()) for d in directories)]
    with (directories[0] / LOG).open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, check=False, env={**os.environ, **_threads(jobs)}
            )
        except OSError as error:
            raise UserError(f"--launcher: {shlex.join(launcher)} can't be run: {error.strerror}") from None
    said = (directories[0] / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    otherwise = f"exit code {done.returncode}" + (f", {said[-1]}" if said else "")
    left = [(cell, directory) for cell, directory in zip(cells, directories, strict=True) if missing(cell, out)]
    return [Failure(cell, _reason(directory / ERROR) or otherwise) for cell, directory in left]


def _reason(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    jobs: int = 1,
    together: int = 1,
    launcher: Sequence[str] = (),
    deadline: float | None = None,
    say: Callable[[str], None] = print,
) -> list[Failure]:
    """Run what is missing of ``cells``, in their order, ``jobs`` processes at a time; returns those that failed.

    ``together``: cells that one process runs, worth more than 1 where a cell takes less time than a process to start.
    ``launcher`` is put before each process's command. None is started after ``deadline`` (seconds since the epoch).
    """
    distinct = merged(cells)
    waiting = [cell for cell in distinct if missing(cell, out)]
    say(f"{len(distinct)} cells, {len(distinct) - len(waiting)} done before")

    def work(first: int) -> list[Failure]:
        batch = waiting[first : first + together]
        if deadline is not None and time.time() > deadline:
            return [Failure(cell, "not started: the time was up") for cell in batch]
        began = time.perf_counter()
        failures = _run(batch, out, launcher, jobs)
        seconds = time.perf_counter() - began
        said = "".join(f"; {f.cell.address} failed: {f.reason}" for f in failures)
        say(f"cells {first + 1} to {first + len(batch)} of {len(waiting)}: {seconds:.0f} s{said}")
        return failures

    with ThreadPoolExecutor(jobs) as pool:
        return [failure for found in pool.map(work, range(0, len(waiting), together)) for failure in found]
