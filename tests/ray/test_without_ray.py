"""What is said where Ray is not there."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

from e3rl.cli import main
from e3rl.cli.train import train_rank
from e3rl.cluster.ray_ranks import train_on_ray
from e3rl.cluster.training_worker import Begin
from e3rl.errors import UserError
from e3rl.train.listeners import Silent
from e3rl.train.trainer import Trainer
from tests.train.random_lab import lab_config


def test_missing_ray_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'e3rl\[ray\]'"):
        Trainer(lab_config(tmp_path, "rollout.workers=2"))


def test_training_workers_that_nobody_started_are_a_sentence(tmp_path: Path):
    with pytest.raises(UserError, match=r"train\.workers = 2 asks for as many ranks, and there are 1"):
        Trainer(lab_config(tmp_path, "train.workers=2", "train.parallel=ddp"))


def test_torchrun_and_training_workers_are_refused_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = lab_config(tmp_path, "train.workers=2", "train.parallel=ddp")
    with pytest.raises(UserError, match=r"torchrun started this process, and train\.workers starts ranks of its own"):
        train_on_ray(config, partial(train_rank, config), Begin(), Silent())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--replicas", "2"], r"pip install 'e3rl[ray]'"),
        (["--replicas", "-1"], "--replicas must be at least 1"),
        (["--replicas", "2", "--page"], "--page shows one process"),
    ],
)
def test_copies_that_cannot_be_served_are_a_sentence(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", "lab", "--port", "0", *arguments]) == 2
    assert said in capsys.readouterr().err
