"""Two ranks with an environment each for their own rollouts make the run of one process."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from e3rl.cli.recipes import find_recipe
from e3rl.config import load_config
from e3rl.train.ledger import ledger_path
from e3rl.train.run_directory import read_lines
from e3rl.train.trainer import Trainer
from tests.ranks.launch import ANOTHER_LAUNCH, ENVIRONMENT, TORCHRUN, succeed

SETTINGS = (
    *("train.steps=2", "train.prompts_per_step=2", "train.save_steps=0", "eval.limit=2", "eval.num_samples=2"),
    *("rollout.num_generations=4", "environments.erase=errors", 'rewards.functions=["environment"]'),
)
pytestmark = pytest.mark.timeout(900)


@ANOTHER_LAUNCH
def test_two_ranks_use_tools_as_one_process_does(tmp_path: Path):
    """Calls, results, erased turns and what get_reward() returned, of both ranks' environments."""
    own = (*SETTINGS, f"run.output_dir={tmp_path}")
    Trainer(load_config(find_recipe("tools-demo"), [], [*own, "run.name=one"])).train()
    command = [*TORCHRUN, "2", "-m", "e3rl", "train", "tools-demo", *own, "run.name=two", "train.parallel=ddp"]
    succeed(subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=800, check=False))
    rewards = set()
    for step in (1, 2):
        alone, together = (pq.read_table(ledger_path(tmp_path / name, step)).to_pylist() for name in ("one", "two"))
        for ours, theirs in zip(alone, together, strict=True):
            assert theirs["response"] == ours["response"]
            assert theirs["reward_parts"] == ours["reward_parts"]
            seen = [[(c["start"], c["text"], c["observation"]) for c in row["erasures"]] for row in (ours, theirs)]
            assert seen[0] == seen[1]
            rewards.add(ours["reward"])
    assert rewards == {0.0, 1.0}
    ours, theirs = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["loss"] for line in theirs] == [pytest.approx(line["loss"], abs=1e-6) for line in ours]
