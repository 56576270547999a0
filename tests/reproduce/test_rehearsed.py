"""The papers' cells in rehearsal: the process that would run them, killed once, at the k of their tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from e3rl.cli import main
from e3rl.rehearse.stages import Stages
from e3rl_reproduce.reproduce import first_cells, tasks
from e3rl_reproduce.worker import main as worker_main


def test_the_first_cells_are_those_that_would_run_first(tmp_path: Path):
    todo = tasks(["table1", "table2", "table6"], "paper", out=tmp_path, model="Qwen3-4B")
    names = list(first_cells(todo, 9, tmp_path))
    assert names[:2] == ["Qwen3-4B, Vanilla", "Qwen3-4B, GRPO"]
    assert names[6:9] == ["Qwen3-4B, E3RL", "Qwen3-4B, w/o extremum deviation", "Qwen3-4B, w/o gradient anomaly"]
    assert list(first_cells(todo, 1, tmp_path)) == names[:1]


def test_the_first_two_cells_of_table_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """In this process: a kill and a load are what `e3rl rehearse` does, and are tested there."""
    ran: list[str] = []

    def here(self: Stages, name: str, command: list[str]) -> str:
        ran.append(name)
        if "-c" not in command:
            monkeypatch.setattr("sys.argv", ["worker", *command[command.index("e3rl_reproduce.worker") + 1 :]])
            assert worker_main() == 0
        return ""

    monkeypatch.setattr(Stages, "run", here)
    monkeypatch.setattr(Stages, "run_until_saved", lambda self, name, command, run: ran.append(name))
    where = ["--scale", "paper", "--model", "Qwen3-4B", "--rehearse", "2", "--out", str(tmp_path)]
    assert main(["reproduce", "table1", *where]) == 0
    assert ran[:3] == ["Qwen3-4B, Vanilla: examine", "Qwen3-4B, GRPO: train", "Qwen3-4B, GRPO: go on, examine"]
    assert ran[3:4] == ["export, loaded by transformers"]
    shown = capsys.readouterr().out
    for words in (
        "Qwen3-4B, GRPO: examined on AMC 2023, AIME 2024, AIME 2025, AIME 2026, MATH 500, Minerva, OlympiadBench, k = 32",
        "Qwen3-4B, GRPO: evaluated at step 3: amc23, aime24, aime25, aime26, math500, minerva, olympiadbench, k = 32",
        "rollout.segment_length",
    ):
        assert words in shown
    [run] = tmp_path.glob("cells/*/run")
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_bad_numbers_and_missing_extras_are_sentences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    command = ["reproduce", "table1", "--scale", "paper", "--out", str(tmp_path), "--rehearse"]
    assert main([*command, "0"]) == 2
    assert "--rehearse must be at least 1" in capsys.readouterr().err
    monkeypatch.setattr("e3rl.rehearse.rehearsal.find_spec", lambda name: None)
    assert main([*command, "2", "--overlay", "topologies/32xh100"]) == 2
    assert "need vllm, ray, deepspeed: pip install 'e3rl[vllm,ray,deepspeed]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing was begun"
