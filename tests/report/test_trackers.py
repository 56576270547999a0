"""Experiment trackers: what they are told, under names that they can keep, and that none can end a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from e3rl.errors import UserError
from e3rl.report.trackers import MLflow, Tracked, build_trackers
from e3rl.train.listeners import Silent


def test_no_metric_is_the_folder_of_another():
    """MLflow's file store keeps each metric in a file; found by running it."""
    told: dict[str, float] = {}
    module = SimpleNamespace(log_metrics=lambda metrics, step: told.update(metrics))
    record = {"step": 1, "clip_fraction": 0.5, "clip_fraction/segment_0": 0.25, "threshold": [1.0, 2.0], "length": 3.0}
    MLflow(module).stepped(record)
    names = set(told)
    assert names >= {
        "train/clip_fraction",
        "train/clip_fraction.segment_0",
        "train/threshold/1",
        "train/completions/mean_length",
    }
    assert not [a for a in names for b in names if a.startswith(f"{b}/")]


class Broken(Silent):
    def __init__(self) -> None:
        self.told: list[str] = []

    def stepped(self, record: Any) -> None:
        self.told.append("stepped")
        raise ConnectionError("no route to host\nmore")

    def finished(self, summary: Any) -> None:
        self.told.append("finished")


def test_a_tracker_that_fails_ends_no_run():
    said: list[str] = []
    broken = Broken()
    tracked = Tracked("wandb", broken, said.append)
    for step in (1, 2):
        tracked.stepped({"step": step})
    tracked.finished({})
    assert broken.told == ["stepped"]
    assert said == ["wandb failed and gets no more data: no route to host. metrics.jsonl has everything"]


def test_a_package_that_is_missing_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "swanlab", None)
    with pytest.raises(UserError, match=r"names swanlab, which is not installed: pip install 'e3rl\[swanlab\]'"):
        build_trackers(("swanlab",), print)
    with pytest.raises(UserError, match="Did you mean"):
        build_trackers(("tensorbord",), print)


def test_mlflow_itself_keeps_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'e3rl[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path}")
    tracker = MLflow(mlflow)
    mlflow.set_experiment("e3rl")
    mlflow.start_run(run_name="one")
    tracker.stepped({"step": 3, "clip_fraction": 0.5, "clip_fraction/segment_0": 0.25})
    tracker.finished({})
    (run,) = mlflow.search_runs(output_format="list")
    assert run.data.metrics == {
        "train/step": 3, "train/clip_fraction": 0.5, "train/clip_fraction.segment_0": 0.25,
        "train/clip_ratio/region_mean": 0.5,
    }  # fmt: skip
