"""Ranks on Ray train what one process trains, through kills and stops; and what is said when they can't."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from e3rl.cli.train import train_rank
from e3rl.cluster.ray_ranks import train_on_ray
from e3rl.cluster.training_worker import Begin
from e3rl.config import Config, to_toml
from e3rl.errors import UserError
from e3rl.train.listeners import Silent
from tests.ranks.launch import alone
from tests.ranks.run import SETTINGS as RANKS_SETTINGS
from tests.ranks.run import STEPS
from tests.ranks.test_ranks import assert_same_run
from tests.ray import jobs
from tests.train.random_lab import lab_config

pytestmark = pytest.mark.timeout(600)  # several processes start, each with PyTorch, on as few cores as there are
WORKERS = ("train.workers=2", "train.parallel=ddp")


class Listening(Silent):
    """Remembers what it is told; may act at a step."""

    def __init__(self, act: Any = lambda step: None) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []
        self._act = act

    def noted(self, text: str) -> None:
        self.notes.append(text)

    def stepped(self, record: Mapping[str, Any]) -> None:
        self.steps.append(record["step"])
        self._act(record["step"])


def config_of(directory: Path, *overrides: str) -> Config:
    return lab_config(directory, *RANKS_SETTINGS, f"train.steps={STEPS}", *WORKERS, *overrides)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A Ray with room for ranks and rollout workers."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def placed(ray: Any) -> list[int]:
    """How many workers each group has for which Ray keeps room."""
    groups = ray.util.placement_group_table().values()
    return [len(group["bundles"]) for group in groups if group["state"] != "REMOVED"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's run."""
    directory = tmp_path_factory.mktemp("alone")
    alone(directory, "none")
    return directory / "none"


@pytest.mark.parametrize("more", [(), ("rollout.workers=1",)], ids=["ranks generate", "a worker generates"])
def test_two_training_workers_train_what_one_process_trains(
    ray: Any, tmp_path: Path, expected: Path, more: tuple[str, ...]
):
    """They are placed together, and their room is given back."""
    places: list[list[int]] = []
    config, listener = config_of(tmp_path, *more), Listening(lambda step: places.append(placed(ray)))
    path, summary = train_on_ray(config, partial(train_rank, config), Begin(), listener)
    assert places == [[2]] * STEPS
    assert placed(ray) == []
    assert summary["steps"] == STEPS
    assert listener.steps == list(range(1, STEPS + 1))
    assert_same_run(path, expected, f"2, ddp, rollouts: {more or 'the ranks'}")


def test_what_training_workers_saved_one_process_takes_up(ray: Any, tmp_path: Path, expected: Path):
    half = config_of(tmp_path, f"train.steps={STEPS // 2}", "train.parallel=fsdp2")
    path, _ = train_on_ray(half, partial(train_rank, half), Begin(), Listening())
    whole = lab_config(tmp_path, *RANKS_SETTINGS, f"train.steps={STEPS}")
    train_rank(whole, Begin(resume=True), Listening())
    assert_same_run(path, expected, "2, then 1, fsdp2")


def test_a_killed_training_worker_is_replaced_and_the_run_goes_on_from_its_checkpoint(
    ray: Any, tmp_path: Path, expected: Path
):
    config = config_of(tmp_path, "train.save_steps=1")
    killed: list[int] = []

    def kill(step: int) -> None:
        if step == 2 and not killed:
            killed.append(int((tmp_path / "rank-1").read_text()))
            os.kill(killed[0], signal.SIGKILL)

    listener = Listening(kill)
    path, _ = train_on_ray(config, partial(jobs.train_and_say_who, config, tmp_path), Begin(), listener)
    assert killed
    [note] = [text for text in listener.notes if "begin again" in text]
    assert note.startswith("training worker 1 is lost")
    assert_same_run(path, expected, "2, ddp, rank 1 killed")
    print(f"\nkilled {killed[0]}; steps told: {listener.steps}; {note}")


def test_training_workers_that_die_each_time_end_the_run(ray: Any, tmp_path: Path):
    began, listener = time.monotonic(), Listening()
    with pytest.raises(UserError, match=r"lost 3 times with no new step between.*training worker 1 is lost"):
        train_on_ray(config_of(tmp_path), jobs.die, Begin(), listener)
    assert len(listener.notes) == 2
    assert time.monotonic() - began < 150


def test_what_a_rank_says_to_the_user_is_said_while_the_others_still_wait(ray: Any, tmp_path: Path):
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^the cup is empty: fill it$"):
        train_on_ray(config_of(tmp_path), jobs.refuse, Begin(), Listening())
    assert time.monotonic() - began < 60


def test_a_recipe_that_ranks_refuse_is_refused_in_their_words(ray: Any, tmp_path: Path):
    config = config_of(tmp_path, "train.parallel=none")
    with pytest.raises(UserError, match=r"train\.parallel = 'none' would train the same model in each"):
        train_on_ray(config, partial(train_rank, config), Begin(), Listening())


def test_training_workers_of_another_version_are_refused(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("e3rl.cluster.ray_ranks.__version__", "0.0.1")
    with pytest.raises(UserError, match=r"training worker 0, on .*, runs e3rl .*, and this process 0\.0\.1: install"):
        train_on_ray(config_of(tmp_path), jobs.die, Begin(), Listening())


def test_room_is_needed_for_both_kinds_of_workers(ray: Any, tmp_path: Path):
    config = config_of(tmp_path, "train.worker_gpus=1", "rollout.workers=1", "rollout.worker_gpus=2")
    with pytest.raises(UserError, match=r"rollout\.workers = 1 and train\.workers = 2 need 4 GPUs of 0"):
        train_on_ray(config, jobs.die, Begin(), Listening())


def test_a_stop_is_passed_on_and_the_run_can_be_resumed(tmp_path: Path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(config_of(tmp_path, "train.steps=200")))
    command = [sys.executable, "-m", "e3rl", "train", str(recipe)]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert run.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    assert run.wait(120) == 130
    said = (tmp_path / "log").read_text()
    assert "--resume" in said
    assert "Traceback" not in said
    done = metrics.read_text().count("\n")
    rest = ["--resume", "train.workers=0", "train.parallel=none", f"train.steps={done + 1}"]
    subprocess.run([*command, *rest], check=True, capture_output=True, timeout=120)
    assert metrics.read_text().count("\n") == done + 1
