"""What is measured is what the recipe says: sampling, and any number of samples on few rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from e3rl.cli.recipes import find_recipe
from e3rl.cluster.pool import Place
from e3rl.cluster.server import make_server
from e3rl.cluster.worker import RolloutWorker
from e3rl.config import Config, load_config
from e3rl.errors import UserError
from e3rl.models import load_policy
from e3rl.web.access import Access
from e3rl_reproduce.measures import exam
from tests.train.random_lab import lab_config
from tests.web.running import running

SIZES: dict[str, Any] = {"benchmarks": {"chain 1": "lab:chain:1", "chain 3": "lab:chain:3"}, "problems": 6}


def _exam(*settings: str, samples: int = 8, **options: Any) -> dict[str, Any]:
    config = load_config(find_recipe("lab"), overrides=settings)
    return exam(load_policy(config.model), config, **SIZES, samples=samples, **options)


def test_an_exam_decodes_as_the_recipe_says():
    cold, warm = (_exam(f"eval.temperature={t}") for t in (0.05, 1.0))
    assert cold["chain 3"]["right"] != warm["chain 3"]["right"]
    assert set(cold["chain 1"]["right"]) <= {0, 8}, "all but greedy"
    assert _exam("eval.temperature=1.0", "eval.top_k=1")["chain 1"]["right"] == cold["chain 1"]["right"]


def test_an_exam_of_more_samples_than_rows():
    few = _exam("rollout.num_generations=2", "rollout.cache_rows=4", "rollout.max_rows=4", samples=9)
    assert few["chain 3"]["right"] == _exam(samples=9)["chain 3"]["right"]
    erased = _exam("rollout.num_generations=4", "rollout.cache_rows=4", "rollout.max_rows=4", samples=9, erase=True)
    assert erased["chain 1"]["samples"] == 9


def test_an_exam_by_servers_is_that_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The weights that were trained are sent to them; here they differ from those that the server began with."""
    config = lab_config(
        tmp_path, "rollout.num_generations=2", "rewards.functions=['tests.reproduce.test_measures:even']"
    )
    policy = load_policy(config.model)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(1.7)
    alone = exam(policy, config, **SIZES, samples=5)
    worker = RolloutWorker(config, 60)
    with running(make_server(worker, Access("127.0.0.1"), 0, 2**26)) as server:
        elsewhere = replace(config, rollout=replace(config.rollout, servers=(server.url,)))
        monkeypatch.setattr("e3rl.cluster.rollouts.build_engine", lambda *_: pytest.fail("an engine was built"))
        assert exam(policy, elsewhere, **SIZES, samples=5) == alone
    assert len({right for result in alone.values() for right in result["right"]}) > 1


def test_an_exam_after_a_training_on_ray_has_all_of_its_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[int, float]] = []

    def places(config: Config, longest_prompt: int) -> list[Place]:
        asked.append((config.rollout.workers, config.rollout.worker_gpus))
        raise UserError("no cluster")

    monkeypatch.setattr("e3rl.cluster.rollouts.ray_places", places)
    for settings in (
        ["train.workers=8", "train.worker_gpus=1"],
        ["train.workers=16", "train.worker_gpus=1", "rollout.workers=16", "rollout.worker_gpus=0.5"],
    ):
        with pytest.raises(UserError, match="no cluster"):
            exam(load_policy(lab_config(tmp_path).model), lab_config(tmp_path, *settings), **SIZES, samples=1)
    assert asked == [(8, 1.0), (32, 0.5)]


def even(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """A reward that a random model gets now and then."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]
