"""The quickstart's own data, reward and recipe train, taken from the page as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from e3rl.config import load_config
from e3rl.train.run_directory import read_lines
from e3rl.train.trainer import Trainer
from tests.docs.pages import ROOT, blocks


def test_own_data_and_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = {b.language: b.body for b in blocks(ROOT / "docs" / "quickstart.md")}  # the last of each language
    files = {"problems.jsonl": found["json"], "my_rewards.py": found["python"], "my.toml": found["toml"]}
    for name, body in files.items():
        (tmp_path / name).write_text(body, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(load_config(Path("my.toml"), overrides=["train.steps=1"]))
    assert trainer.train()["steps"] == 1
    (record,) = read_lines(trainer.run_path / "metrics.jsonl")
    assert record["reward_missing"] == 0
    assert 0 < record["reward"] <= 1  # the embedded model solves most of such problems
