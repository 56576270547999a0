"""Starting ranks as a user does, and reading what their runs left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from e3rl.config import to_toml
from e3rl.train.trainer import Trainer
from tests.ranks.run import SETTINGS, STEPS, settings
from tests.train.random_lab import lab_config, random_lab

TOLERANCE = 1e-4
ALL = os.environ.get("E3RL_RANKS") == "all"
ANOTHER_LAUNCH = pytest.mark.skipif(not ALL, reason="starts ranks once more, which takes its time: make test-ranks")
DEEPSPEED = ("deepspeed-zero2", "deepspeed-zero3") if ALL and importlib.util.find_spec("deepspeed") else ()
MODES = ("ddp", "zero1", "zero2", "fsdp2", *DEEPSPEED)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def torchrun(directory: Path, *names: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The runs with these names, by two ranks."""
    return subprocess.run(
        [*TORCHRUN, "2", "-m", "tests.ranks.run", random_lab(), str(directory), *names],
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """The address of a process that generates for others."""
    recipe = directory / "server.toml"
    recipe.write_text(to_toml(lab_config(directory, *SETTINGS)))
    command = [sys.executable, "-m", "e3rl", "rollout-server", str(recipe), "--port", "0", "--longest-prompt", "60"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().split()[0]
        server.kill()


def succeed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "Error" in line)[-2500:]


def alone(directory: Path, name: str, resume: bool = False) -> None:
    """The same run by one process."""
    overrides = [s for s in settings(name) if not s.startswith(("train.parallel", "train.context_parallel"))]
    Trainer(lab_config(directory, *overrides), resume=resume).train()


def copy_run(run: Path, new: Path) -> None:
    """A run under another name or in another place, as if it had been made there."""
    shutil.copytree(run, new)
    recipe = new / "config.toml"
    text = recipe.read_text().replace(str(run.parent), str(new.parent))
    recipe.write_text(text.replace(f'"{run.name}"', f'"{new.name}"'))
    (new / "summary.json").unlink(missing_ok=True)


def curve(run: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(record["loss"], record["grad_norm"]) for record in map(json.loads, lines)]


def assert_same_run(run: Path, expected: Path, what: str) -> None:
    """The same loss and gradient norm at every step; weights alike but where a gradient is nothing but rounding."""
    found, wanted = curve(run), curve(expected)
    assert len(found) == len(wanted) == STEPS
    difference = max(abs(a - b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True))
    ours, theirs = weights(run), weights(expected)
    apart = max((ours[n] - theirs[n]).abs().mean().item() for n in theirs)
    print(f"\n| {what} | {' | '.join(f'{loss:+.6f}' for loss, _ in found)} | {difference:.1e} | {apart:.1e} |", end="")
    assert difference < TOLERANCE
    assert apart < TOLERANCE


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")
