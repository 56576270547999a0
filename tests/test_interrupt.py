"""Ctrl-C in commands other than training: a sentence, exit code 130, no traceback, and no process stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_guard import running, wait_until

CALIBRATE = ("calibrate", "lab", "lab:chain:6", "--prompts", "100000", "--output", "statistics")
EVALUATE = (
    "eval",
    "lab",
    "lab:chain:6",
    "--output",
    "samples",
    "--workers",
    "2",
    "eval.limit=200",
    "eval.num_samples=64",
)


def _computes(process: int) -> bool:
    """Whether it has loaded PyTorch, which is what takes a command's first seconds."""
    return "libtorch_cpu" in Path(f"/proc/{process}/maps").read_text()


def _children(process: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _workers_compute(process: int) -> bool:
    return len(found := _children(process)) == 2 and all(_computes(child) for child in found)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    ("arguments", "ready", "said"),
    [
        (CALIBRATE, _computes, "stopped"),
        (EVALUATE, _workers_compute, "stopped with at least"),
    ],
    ids=["calibrate", "eval-workers"],
)
def test_an_interrupted_command_says_so_and_ends(
    arguments: tuple[str, ...], ready: Callable[[int], bool], said: str, tmp_path: Path
):
    """Sent to the whole group of processes, as a terminal does."""
    command = subprocess.Popen(
        [sys.executable, "-m", "e3rl", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        wait_until(lambda: ready(command.pid))
        family = [command.pid, *_children(command.pid)]
        os.killpg(command.pid, signal.SIGINT)
        _, told = command.communicate(timeout=60)
    finally:
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)
    assert command.returncode == 130, told
    [line] = told.strip().splitlines()
    assert line.startswith(f"e3rl: {said}")
    assert not any(running(process) for process in family)
