"""A trainer whose rollouts are elsewhere builds no engine, and its run is the one that it would have made by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from e3rl.cluster.server import make_server
from e3rl.cluster.worker import RolloutWorker
from e3rl.train import trainer as module
from e3rl.train.trainer import Trainer
from e3rl.web.access import Access
from tests.train.random_lab import lab_config
from tests.web.running import running

SETTINGS = (
    *("rollout.num_generations=3", "rollout.max_segments=3", "erasure.kappa0=0.8", "train.eval_steps=1"),
    *('data.eval=["lab:chain:1"]', "eval.limit=3", "eval.num_samples=5", "eval.erasable=true"),
)


def _lines(run: Path, log: str) -> list[dict]:
    found = [json.loads(line) for line in (run / log).read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and k not in ("checksum", "time")} for line in found]


def test_training_and_evaluation_by_a_server_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = lab_config(tmp_path, *SETTINGS, "run.name=here")
    Trainer(config).train()
    worker = RolloutWorker(config, 60)
    with running(make_server(worker, Access("127.0.0.1"), 0, 2**26)) as server:
        monkeypatch.setattr(module, "build_engine", lambda *_: pytest.fail("an engine was built"))
        Trainer(lab_config(tmp_path, *SETTINGS, "run.name=there", f'rollout.servers=["{server.url}"]')).train()
    here, there = tmp_path / "here", tmp_path / "there"
    evaluations = _lines(here, "evaluations.jsonl")
    assert len({line["step"] for line in evaluations}) == 3
    assert {line["mode"] for line in evaluations} == {"plain", "erasable"}
    assert _lines(there, "evaluations.jsonl") == evaluations
    assert [line["loss"] for line in _lines(there, "metrics.jsonl")] == [
        pytest.approx(line["loss"], abs=1e-6) for line in _lines(here, "metrics.jsonl")
    ]
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (here, there))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
