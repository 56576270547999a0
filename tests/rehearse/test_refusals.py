"""What can't run is refused with a sentence and exit code 2, before the first step."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from e3rl.cli import main
from e3rl.cli.train import launch
from e3rl.cluster.training_worker import Begin
from e3rl.config import to_toml
from e3rl.errors import UserError
from e3rl.train.listeners import Silent
from e3rl_reproduce.running import requirements
from tests.train.random_lab import lab_config


def _refused(arguments: list[str], words: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert words in " ".join(said.err.split())
    assert "train: python" not in said.out, "no process of a rehearsal was begun"
    assert not list(place.rglob("metrics.jsonl"))


@pytest.mark.parametrize("command", ["train", "rehearse"])
def test_a_benchmark_that_is_not_there(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tmp_path / "own.toml"
    recipe.write_text(to_toml(lab_config(tmp_path)))
    place = ["--directory", str(tmp_path / "rehearsal")] if command == "rehearse" else []
    named = [command, str(recipe), *place, "data.eval=['lab:chain:1', 'amie24']"]
    _refused(named, "Did you mean 'aime24'?", tmp_path, capsys)
    (tmp_path / "benchmarks").mkdir()
    lost = [command, str(recipe), *place, "data.eval=['aime24']", f"data.directory={tmp_path / 'benchmarks'}"]
    _refused(lost, "has no file for 'aime24': expected aime24.jsonl", tmp_path, capsys)


def _cluster(gpus: int) -> SimpleNamespace:
    """Ray, connected to a cluster with so many GPUs."""
    return SimpleNamespace(is_initialized=lambda: True, cluster_resources=lambda: {"CPU": 64.0, "GPU": float(gpus)})


def test_a_topology_that_exceeds_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", _cluster(7))
    ranks = lab_config(
        tmp_path, "train.workers=8", "train.worker_gpus=1", "train.parallel=fsdp2", "train.prompts_per_step=8"
    )
    with pytest.raises(UserError, match=r"train\.workers = 8 need 8 GPUs of 7 that the Ray cluster has: lower them"):
        launch(ranks, Begin(), Silent())
    workers = lab_config(tmp_path, "rollout.workers=8", "rollout.worker_gpus=1")
    with pytest.raises(UserError, match=r"rollout\.workers = 8 need 8 GPUs of 7 that the Ray cluster has"):
        launch(workers, Begin(), Silent())
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_reproducing_on_more_gpus_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    own = [
        "model.path=/models/own",
        "train.workers=16",
        "train.worker_gpus=1",
        "rollout.workers=16",
        "rollout.worker_gpus=1",
    ]
    told = requirements(lab_config(tmp_path, *own))
    assert "32 GPUs, and this machine has 1: a Ray cluster (rollout.address)" in told
    assert not any("GPUs" in need for need in requirements(lab_config(tmp_path, *own, "rollout.address=auto")))
    assert not any("GPUs" in need for need in requirements(lab_config(tmp_path, own[0])))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--k", "1,64", "eval.num_samples=8"], "64"),
        (
            [
                "--erase",
                "rollout.num_generations=2",
                "rollout.cache_rows=2",
                "rollout.max_rows=2",
                "eval.num_samples=4",
            ],
            "min_siblings",
        ),
    ],
)
def test_k_above_what_a_round_could_hold(
    settings: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = lab_config(tmp_path, "erasure.min_siblings=3")
    recipe = tmp_path / "own.toml"
    recipe.write_text(to_toml(config))
    where = ["--recipe", str(recipe), "--output", str(tmp_path / "evaluation")]
    _refused(["eval", config.model.path, "lab:chain:1", *where, *settings], words, tmp_path, capsys)
