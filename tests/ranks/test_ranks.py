"""Two ranks on gloo train the model that one process trains; what they save, any number of ranks takes up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from e3rl.errors import UserError
from e3rl.train.trainer import Trainer
from tests.ranks.run import STEPS, settings
from tests.train.random_lab import lab_config, random_lab

MODES = ("ddp", "zero1", "zero2", "fsdp2")
TOLERANCE = 1e-4
ANOTHER_LAUNCH = pytest.mark.skipif(
    os.environ.get("E3RL_RANKS") != "all", reason="starts ranks once more, which takes its time: make test-ranks"
)


def torchrun(directory: Path, *names: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "tests.ranks.run", random_lab(), str(directory), *names],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        cwd=Path(__file__).parents[2],
        check=False,
    )


def curve(run: Path) -> list[tuple[float, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(record["loss"], record["grad_norm"]) for record in map(json.loads, lines)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def alone(directory: Path, name: str, resume: bool = False) -> None:
    overrides = [s for s in settings(name) if not s.startswith("train.parallel")]
    Trainer(lab_config(directory, *overrides), resume=resume).train()


def assert_same_run(run: Path, expected: Path) -> None:
    """The same loss and gradient norm at every step; weights alike but where a gradient is nothing but rounding."""
    found, wanted = curve(run), curve(expected)
    assert len(found) == len(wanted) == STEPS
    assert max(abs(a - b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True)) < TOLERANCE
    ours, theirs = weights(run), weights(expected)
    assert max((ours[n] - theirs[n]).abs().mean().item() for n in theirs) < TOLERANCE
    print(f"\n{run.name}: " + ", ".join(f"{a[0]:.6f} ({b[0]:.6f})" for a, b in zip(found, wanted, strict=True)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's runs, and two ranks' runs of the same."""
    directory = tmp_path_factory.mktemp("runs")
    for name in ("none", "none-several", "none-half"):
        alone(directory, name)
    done = torchrun(directory, *MODES, "ddp-several", *(f"{mode}-half" for mode in MODES))
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "Error" in line)[-2500:]
    return directory


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_train_what_one_process_trains(runs: Path, mode: str):
    assert_same_run(runs / mode, runs / "none")


def test_several_updates_of_a_step_too(runs: Path):
    assert_same_run(runs / "ddp-several", runs / "none-several")


@pytest.mark.parametrize("mode", MODES)
def test_what_two_ranks_saved_one_process_takes_up(runs: Path, mode: str, tmp_path: Path):
    shutil.copytree(runs / f"{mode}-half", tmp_path / "none-half")
    recipe = tmp_path / "none-half" / "config.toml"
    recipe.write_text(recipe.read_text().replace(str(runs), str(tmp_path)).replace(f'"{mode}-half"', '"none-half"'))
    (tmp_path / "none-half" / "summary.json").unlink()
    alone(tmp_path, "none-half+", resume=True)
    assert_same_run(tmp_path / "none-half", runs / "none")


@ANOTHER_LAUNCH
def test_what_one_process_saved_two_ranks_take_up(runs: Path, tmp_path: Path):
    shutil.copytree(runs / "none-half", tmp_path / "zero1-half")
    recipe = tmp_path / "zero1-half" / "config.toml"
    recipe.write_text(recipe.read_text().replace(str(runs), str(tmp_path)).replace('"none-half"', '"zero1-half"'))
    done = torchrun(tmp_path, "zero1-half+")
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "Error" in line)[-2500:]
    assert_same_run(tmp_path / "zero1-half", runs / "none")


def test_processes_that_would_train_apart_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"train\.parallel = 'none' would train the same model in each"):
        Trainer(lab_config(tmp_path))
    with pytest.raises(UserError, match="RANK, MASTER_ADDR, MASTER_PORT is not: start the processes with torchrun"):
        Trainer(lab_config(tmp_path, "train.parallel=ddp"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"train\.prompts_per_step = 2 groups: raise it or start fewer"):
        Trainer(lab_config(tmp_path, "train.parallel=ddp"))
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UserError, match="WORLD_SIZE = 'many' is no number"):
        Trainer(lab_config(tmp_path, "train.parallel=ddp"))


@ANOTHER_LAUNCH
def test_ranks_with_other_settings_are_refused(tmp_path: Path):
    done = torchrun(tmp_path, "ddp", "different")
    assert "were started with other settings than rank 0" in done.stdout + done.stderr
