"""Rollout workers on Ray: one, two, one of them killed in the middle; the cluster too small, not there, gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from e3rl.cluster.ray_workers import RayConnection, ray_places
from e3rl.config import Config, to_toml
from e3rl.errors import UserError
from e3rl.train.listeners import Silent
from e3rl.train.trainer import Trainer
from tests.cluster.places import LONGEST_PROMPT, SETTINGS, World, ids
from tests.train.random_lab import lab_config

TRAINING = ("data.train_limit=8", "train.steps=3", "train.prompts_per_step=4", "train.learning_rate=1e-2")


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_groups_of_one_process(ray: Any, tmp_path: Path, workers: int):
    world = World.of(lab_config(tmp_path, *SETTINGS, f"rollout.workers={workers}"))
    pool = world.pool(*ray_places(world.config, LONGEST_PROMPT), poll=0.5)
    began = time.monotonic()
    groups = world.run(pool)
    print(
        f"\n{workers} workers: {len(groups)} groups in {time.monotonic() - began:.1f} s, start of the workers included"
    )
    assert ids(groups) == ids(world.local())
    pool.close()


class Notes(Silent):
    """What a run noted."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def noted(self, text: str) -> None:
        self.texts.append(text)


def train(config: Config) -> tuple[list[Any], dict[str, torch.Tensor], list[str]]:
    """A run's responses with their verdicts, its final weights, and what it noted."""
    notes = Notes()
    trainer = Trainer(config, listeners=[notes])
    trainer.train()
    ledgers = sorted((trainer.run_path / "rollouts").glob("*.parquet"))
    columns = ["step", "problem_id", "sibling", "policy_version", "response", "finish", "reward"]
    rows = [row for ledger in ledgers for row in pq.read_table(ledger, columns=columns).to_pylist()]
    return rows, load_file(trainer.run_path / "model" / "model.safetensors"), notes.texts


def test_a_worker_killed_in_a_run_changes_neither_trajectories_nor_final_weights(
    ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    alone = train(lab_config(tmp_path, *SETTINGS, *TRAINING, "run.name=alone"))
    exchange, killed = RayConnection.exchange, []

    def killing(self: RayConnection, body: bytes) -> bytes:
        if len(killed) < 2 and b'"tasks":[{' in body and b'"step":2' in body:
            pid = ray.get(self._actor.__ray_call__.remote(lambda _: os.getpid()), timeout=20)
            reference = self._actor.exchange.remote(body)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            return self._wait(reference, 20)
        return exchange(self, body)

    monkeypatch.setattr(RayConnection, "exchange", killing)
    rows, weights, notes = train(lab_config(tmp_path, *SETTINGS, *TRAINING, "run.name=disturbed", "rollout.workers=2"))
    assert len(killed) == 2
    assert sum("is lost" in note for note in notes) == 2
    assert rows == alone[0]
    assert all(torch.equal(weights[name], tensor) for name, tensor in alone[1].items())
    print(f"\nkilled {killed}; {len(rows)} trajectories and all {len(weights)} weights equal to the undisturbed run's")


def test_more_workers_than_the_cluster_has_room_for_are_refused(ray: Any, tmp_path: Path):
    with pytest.raises(UserError, match="need 2 GPUs of 0 that the Ray cluster has"):
        ray_places(lab_config(tmp_path, "rollout.workers=2", "rollout.worker_gpus=1"), LONGEST_PROMPT)


def test_a_model_that_the_workers_can_not_load_is_named(ray: Any, tmp_path: Path):
    world = World.of(lab_config(tmp_path, *SETTINGS, "rollout.workers=1"))
    elsewhere = lab_config(tmp_path, *SETTINGS, "rollout.workers=1", f"model.path={tmp_path}/nothing")
    with pytest.raises(UserError, match="nothing"):
        world.run(world.pool(*ray_places(elsewhere, LONGEST_PROMPT)))


def test_no_cluster_at_the_address_is_a_sentence(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from tests.train.random_lab import lab_config\n"
        "from e3rl.cluster.ray_workers import ray_places\n"
        f"ray_places(lab_config(Path({str(tmp_path)!r}), 'rollout.workers=1', 'rollout.address=ray://127.0.0.1:1'), 40)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "UserError: Ray can't be reached at ray://127.0.0.1:1 (rollout.address)" in done.stderr


_HEAD = """
import ray, time
print(ray.init("local", num_cpus=2, include_dashboard=False).address_info["gcs_address"], flush=True)
time.sleep(600)
"""
"""A head node. (`ray start --head --block` ends at once where the environment lies in a folder with a space.)"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("workers", ["rollout.workers=1", "train.workers=1"])
def test_when_the_head_node_is_gone_the_run_ends_with_a_sentence_and_can_be_resumed(tmp_path: Path, workers: str):
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    head = subprocess.Popen(
        [sys.executable, "-c", _HEAD], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert head.stdout is not None
    address = f"rollout.address={head.stdout.readline().strip()}"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(lab_config(tmp_path, "train.steps=200", "train.save_steps=1", workers, address)))
    command = [sys.executable, "-m", "e3rl", "train", str(recipe)]
    try:
        with (tmp_path / "log").open("w") as log:
            run = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            metrics, began = tmp_path / "run" / "metrics.jsonl", time.monotonic()
            while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
                assert run.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() - began < 200
                time.sleep(0.2)
            os.killpg(head.pid, signal.SIGKILL)
            killed = time.monotonic()
            code = run.wait(90)
            print(f"\n{workers}: the run ended {time.monotonic() - killed:.1f} s after its head node")
    finally:
        head.kill()
        head.wait()
    assert code == 2
    said = (tmp_path / "log").read_text()
    assert "the head node of" in said
    assert "Traceback" not in said
    done = metrics.read_text().count("\n")
    rest = ["--resume", "rollout.workers=0", "train.workers=0", "rollout.address=", f"train.steps={done + 1}"]
    subprocess.run([*command, *rest], check=True, capture_output=True, timeout=120)
    assert metrics.read_text().count("\n") == done + 1
