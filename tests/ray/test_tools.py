"""Environments on Ray's rollout workers: the run is the one that a single process makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from e3rl.config import load_config
from e3rl.train import trainer as module
from e3rl.train.ledger import ledger_path
from e3rl.train.run_directory import read_lines
from e3rl.train.trainer import Trainer
from tests.environments.test_elsewhere import HANGS
from tests.environments.test_training import write_run

FIGURES = ("reward", "reward_missing", "turns", "calls", "call_errors", "erased_turns", "environment_failures", "loss")


def ran(recipe: Path, *own: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The ledger and the metrics of a run's only step."""
    place = recipe.parent
    settings = [f"run.output_dir={place}", f"model.path={place / 'model'}", "environments.timeout=1", *own]
    trainer = Trainer(load_config(recipe, [], settings))
    trainer.train()
    [line] = read_lines(trainer.run_path / "metrics.jsonl")
    return pq.read_table(ledger_path(trainer.run_path, 1)).to_pylist(), line


@pytest.mark.timeout(400)
def test_tools_on_rays_workers_make_the_run_of_one_process(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Calls, results, a turn taken back, a tool that hangs and so costs its reward, what is learnt."""
    recipe = write_run(tmp_path, "e3rl", HANGS)
    rows, line = ran(recipe, "run.name=here")
    monkeypatch.setattr(module, "build_engine", lambda *_: pytest.fail("an engine was built beside the workers"))
    theirs, told = ran(recipe, "run.name=there", "rollout.workers=1")
    assert theirs == rows
    assert [told[n] for n in FIGURES] == [pytest.approx(line[n], abs=1e-6) for n in FIGURES]
    assert [(r["reward"], r["reward_error"]) for r in theirs] == [
        (5.0, None),
        (None, "its environment took longer than 1 s"),
    ]
    [erased] = [e for row in theirs for e in row["erasures"]]
    assert "too many" in erased["observation"]
