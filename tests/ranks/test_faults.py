"""Ranks that don't fit together, die or fall silent: a sentence in a bounded time, never a hang."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from e3rl.cluster.deepspeed import _import_deepspeed, start_engine
from e3rl.cluster.ranks import Ranks
from e3rl.errors import UserError
from e3rl.models import load_policy
from e3rl.train.trainer import Trainer
from tests.ranks.launch import ANOTHER_LAUNCH, ENVIRONMENT, TORCHRUN, alone, curve, torchrun, weights
from tests.ranks.run import settings
from tests.train.random_lab import lab_config, random_lab

pytestmark = pytest.mark.timeout(400)


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


def test_deepspeed_that_is_not_installed_is_a_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"needs DeepSpeed: pip install 'e3rl\[deepspeed\]'; or take zero2 or fsdp2"):
        _import_deepspeed(torch.device("cpu"))


def test_deepspeed_that_is_too_old_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    spec = ModuleSpec("deepspeed", None)  # whoever asks whether DeepSpeed is there looks at it
    ops = SimpleNamespace(__compatible_ops__={})
    old = SimpleNamespace(DeepSpeedEngine=object, __version__="0.15.0", ops=ops, __spec__=spec)
    monkeypatch.setitem(sys.modules, "deepspeed", old)
    config = lab_config(tmp_path, "train.parallel=deepspeed-zero2")
    with pytest.raises(UserError, match=r"DeepSpeed 0\.15\.0 is too old.*pip install --upgrade 'e3rl\[deepspeed\]'"):
        start_engine(load_policy(config.model), config.train, Ranks())


def test_deepspeed_is_not_imported_where_nobody_asks_for_it():
    code = "import sys, e3rl.train.trainer; sys.exit('e3rl.cluster.deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=False).returncode == 0


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    trainer = Trainer(lab_config(tmp_path))
    optimizer = trainer.state.optimizer
    fitting = dict(optimizer.weights())
    name = next(n for n, w in fitting.items() if w.ndim == 2)
    with pytest.raises(UserError, match=rf"of another model: {name} has shape \(1, 2\) there and \("):
        optimizer.load({**fitting, name: torch.zeros(1, 2)}, {})
    with pytest.raises(
        UserError, match=r"of another model: 1 weights are in one of the two alone, more\.weight for one"
    ):
        optimizer.load({**fitting, "more.weight": torch.zeros(1)}, {})


@ANOTHER_LAUNCH
def test_ranks_with_other_settings_are_refused(tmp_path: Path):
    done = torchrun(tmp_path, "ddp", E3RL_DIFFERENT_SEEDS="1")
    assert "were started with settings other than rank 0's" in done.stdout + done.stderr
    assert done.returncode != 0


@ANOTHER_LAUNCH
@pytest.mark.parametrize("late", [0, 1])
def test_ranks_leave_each_at_its_own_time_and_all_end_well(tmp_path: Path, late: int):
    """Also when the first one, at which they met, is gone before the other."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    lab_config(tmp_path)  # writes the recipe
    command = [sys.executable, "-m", "tests.ranks.leaving", str(tmp_path / "recipe.toml"), str(late)]
    environments = [{**ENVIRONMENT, **meeting, "RANK": rank} for rank in ("0", "1")]
    for process in [subprocess.Popen(command, env=e, stderr=subprocess.PIPE, text=True) for e in environments]:
        _, said = process.communicate(timeout=100)
        assert process.returncode == 0, said[-3000:]


def _start(directory: Path, parallel: str, *more: str) -> subprocess.Popen[str]:
    """``torchrun … e3rl train`` of the tests' run, as a user starts it."""
    lab_config(directory)  # writes the recipe
    overrides = [s for s in settings(parallel) if not s.startswith("run.name")]
    command = [*TORCHRUN, "2", "-m", "e3rl", "train", str(directory / "recipe.toml"), *overrides]
    command += [f"model.path={random_lab()}", f"run.output_dir={directory}", "run.name=run", *more]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _rank(torchrun: int, rank: int) -> int:
    """The process of a rank."""
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"rank {rank} is not there")


def _wait(what: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@ANOTHER_LAUNCH
def test_a_rank_that_is_killed_ends_the_run_with_a_sentence_and_the_run_goes_on(tmp_path: Path):
    """After --resume, losses and weights are those of a run that nobody killed."""
    running = _start(tmp_path, "zero1")
    _wait((tmp_path / "run" / "checkpoints" / "step-000002").is_dir, 120)
    os.kill(_rank(running.pid, 1), signal.SIGKILL)
    killed = time.monotonic()
    said, _ = running.communicate(timeout=90)
    print(f"\nover {time.monotonic() - killed:.0f} s after kill -9 of a rank")
    assert running.returncode != 0
    assert "rank 0 waited for another rank that is gone or silent" in " ".join(said.split()), said[-3000:]
    assert "Start all again with --resume" in " ".join(said.split())
    resumed = _start(tmp_path, "zero1", "--resume")
    said, _ = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, said[-3000:]
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    alone(undisturbed, "none")
    assert [x for x, _ in curve(tmp_path / "run")] == pytest.approx(
        [x for x, _ in curve(undisturbed / "none")], abs=1e-4
    )
    ours, theirs = weights(tmp_path / "run"), weights(undisturbed / "none")
    assert max((ours[n] - theirs[n]).abs().mean().item() for n in theirs) < 1e-4


@ANOTHER_LAUNCH
def test_a_rank_that_falls_silent_ends_the_run_with_a_sentence(tmp_path: Path):
    running = _start(tmp_path, "ddp", "train.rank_timeout=8")
    _wait((tmp_path / "run" / "checkpoints" / "step-000002").is_dir, 120)
    os.kill(_rank(running.pid, 1), signal.SIGSTOP)
    stopped = time.monotonic()
    said, _ = running.communicate(timeout=120)
    print(f"\nover {time.monotonic() - stopped:.0f} s after a rank fell silent, of which torchrun waits 30")
    assert running.returncode != 0
    assert "rank 0 waited for another rank that is gone or silent" in " ".join(said.split()), said[-3000:]
