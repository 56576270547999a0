"""Evaluation during training: one source, several, none; and what the logs, the summary and the page say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from e3rl.report.overview import read_overview
from e3rl.train.listeners import Silent
from e3rl.train.run_directory import read_lines
from e3rl.train.trainer import Trainer
from tests.train.random_lab import lab_config

SMALL = ["data.train_limit=4", "train.eval_steps=2", "train.save_steps=0", "eval.limit=2"]
SOURCES = ("lab:chain:1", "lab:path:1")


class Notes(Silent):
    """What a run said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def noted(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trainer = Trainer(lab_config(tmp_path_factory.mktemp("several"), *SMALL, f"data.eval={list(SOURCES)}"))
    trainer.train()
    return trainer.run_path


def test_every_source_and_their_mean_stand_in_the_log(run: Path):
    found = [(r["step"], r["mode"], r["data"]) for r in read_lines(run / "evaluations.jsonl")]
    assert found == [
        (step, mode, data) for step in (0, 2) for mode in ("plain", "erasable") for data in (*SOURCES, "mean")
    ]


def test_the_summary_the_card_and_the_page_have_them_all(run: Path):
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    by_name: dict[str, Any] = summary["after"]
    assert set(by_name) == {m + d for m in ("plain", "erasable") for d in ("", *(f", {s}" for s in SOURCES))}
    assert list(by_name)[:2] == ["plain", "erasable"]
    each = [by_name[f"plain, {source}"]["avg@2"] for source in SOURCES]
    assert by_name["plain"]["avg@2"] == sum(each) / 2
    card = (run / "model" / "README.md").read_text(encoding="utf-8")
    assert "| after | plain, lab:path:1 |" in card
    points = read_overview(run)["evaluations"]
    assert [p["mode"] for p in points].count("plain") == 2
    assert {"plain, lab:chain:1", "erasable, lab:path:1"} <= {p["mode"] for p in points}


def test_an_unknown_source_of_several_is_named_before_the_first_step(tmp_path: Path):
    config = lab_config(tmp_path, *SMALL, "data.eval=['lab:chain:1', 'amie24']")
    with pytest.raises(Exception, match="Did you mean 'aime24'"):
        Trainer(config)
    config = lab_config(tmp_path, *SMALL, "data.eval=['lab:chain:1', 'lab:chain:1']")
    with pytest.raises(Exception, match=r"data\.eval names a source twice"):
        Trainer(config)


def test_a_run_that_never_evaluates_says_so(tmp_path: Path):
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"1+{i}=", "answer": str(1 + i)}) + "\n" for i in range(4)))
    for settings, words in (
        ([], ["nothing is evaluated: data.eval names no held-out problems"]),
        (["train.eval_steps=0"], []),
    ):
        notes = Notes()
        run = f"run.name=noted{len(words)}"
        config = lab_config(
            tmp_path, *SMALL, f"data.train={data}", "train.steps=1", "rewards.functions=math", run, *settings
        )
        Trainer(config, listeners=[notes]).train()
        assert [n.partition(";")[0] for n in notes.said if "evaluated" in n] == words
