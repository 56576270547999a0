"""An evaluation divided over processes: each runs the same command with ``--shard I/N``, on its own GPU if possible."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from e3rl.errors import UserError
from e3rl.plugins import own_python


def _environment(index: int, of: int, gpus: int) -> dict[str, str]:
    """A worker's share of the machine: one of the visible GPUs, or a share of the cores."""
    environment = dict(os.environ)
    if gpus > 1:
        environment["CUDA_VISIBLE_DEVICES"] = str((index - 1) % gpus)
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // of)))
    return environment


def run_workers(arguments: Sequence[str], workers: int, logs: Path, *, gpus: int = 0) -> bool:
    """Run ``e3rl ARGUMENTS --shard I/N`` for every I and wait. False if one stopped early by request.

    If one fails, the others are ended and its last line of output is the error.
    """
    logs.mkdir(parents=True, exist_ok=True)
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    try:
        for index in range(1, workers + 1):
            log = logs / f"worker-{index}of{workers}.log"
            command = [*own_python("e3rl"), *arguments, "--shard", f"{index}/{workers}"]
            with log.open("wb") as file:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=_environment(index, workers, gpus)
                )
            running.append((process, log))
        codes = [_wait(process, log) for process, log in running]
    finally:
        for process, _ in running:
            if process.poll() is None:
                process.terminate()
        for process, _ in running:
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()
    return all(code == 0 for code in codes)


def _wait(process: subprocess.Popen[bytes], log: Path) -> int:
    code = process.wait()
    if code not in (0, 130):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise UserError(
            f"a worker failed ({log}): {lines[-1].removeprefix('e3rl: ') if lines else f'exit code {code}'}"
        )
    return code
