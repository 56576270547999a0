"""The ledger of a run whose erased candidates are learnt from, and whose reward function kills its worker once."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from e3rl.train.run_directory import read_lines
from e3rl.train.trainer import Trainer
from tests.train.random_lab import lab_config

REWARD = '''
import os
from pathlib import Path


def reward(completion_ids, **_):
    """1 where the ids add up to an odd number; the ninth call, in training, ends its worker's life."""
    calls = Path(__file__).with_name("calls")
    count = int(calls.read_text()) + 1 if calls.exists() else 1
    calls.write_text(str(count))
    if count == 9:
        os._exit(3)
    return [float(sum(ids) % 2) for ids in completion_ids]
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("contrast")
    (directory / "dying.py").write_text(REWARD)
    config = lab_config(
        directory,
        f'rewards.functions=["{directory}/dying.py:reward"]',
        "rewards.isolate=true",
        "objective.erased=contrast",
        "objective.contrast_weight=0.5",
        "erasure.kappa0=0",
        "rollout.num_generations=4",
    )
    trainer = Trainer(config)
    trainer.train()
    return trainer.run_path


def test_an_erased_candidates_advantage_stands_beside_it(run: Path) -> None:
    rows = [r for p in sorted((run / "rollouts").glob("*.parquet")) for r in pq.read_table(p).to_pylist()]
    for row in rows:
        assert row["erased_advantages"] == [-0.5 if row["reward"] > 0 else 0.0] * len(row["erasures"])
    assert {a for row in rows for a in row["erased_advantages"]} == {-0.5, 0.0}


def test_a_reward_worker_that_died_is_counted_in_its_step(run: Path) -> None:
    assert sum(r["reward_restarts"] for r in read_lines(run / "metrics.jsonl")) == 1
