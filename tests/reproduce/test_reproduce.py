"""`e3rl reproduce` at smoke scale: real trainings, real exams, pages; resumed, shared, and honest about what failed."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from e3rl.cli import main
from e3rl.cli.recipes import find_recipe
from e3rl.cli.train import train_rank
from e3rl.cluster import ray_ranks
from e3rl.cluster.training_worker import Begin
from e3rl.config import Config, load_config
from e3rl.errors import UserError
from e3rl.files import write_json
from e3rl_reproduce.cells import ERROR, Cell, Measure
from e3rl_reproduce.measures import EXAM
from e3rl_reproduce.worker import main as worker_main
from e3rl_reproduce.worker import run_cell

WHERE = ["--scale", "smoke", "--out"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table 1, and figure 1 of the ERPO paper, made from scratch."""
    out = tmp_path_factory.mktemp("smoke")
    assert main(["reproduce", "table1", "erpo-fig1", *WHERE, str(out)]) == 0
    return out


def _values(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8")))


def test_every_method_is_measured_with_every_seed_at_both_points(done: Path):
    rows = _values(done / "table1-values.csv")
    methods = {"Vanilla", "GRPO", "DAPO", "GSPO", "SAPO", "ERPO", "E3RL"}
    assert {(r["row"], r["seed"], r["at"]) for r in rows} == {
        (m, s, at) for m in methods for s in "01" for at in ("steps", "tokens")
    }
    assert {(r["row"], r["decoding"]) for r in rows if r["decoding"] == "erasable"} == {("E3RL", "erasable")}
    trained = [r for r in rows if r["row"] != "Vanilla"]
    assert {r["step"] for r in trained if r["at"] == "steps"} == {"2"}
    assert all(int(r["tokens"]) > 0 for r in trained)


def test_the_page_shows_ours_beside_the_papers(done: Path):
    page = (done / "table1.md").read_text(encoding="utf-8")
    for words in (
        "equal generated tokens",
        "paper, Qwen3-8B | best baseline | DAPO",
        "+4.286 %",
        "+6.514 %",
        "95 % interval",
    ):
        assert words in page
    assert "Missing" not in page


def test_a_finished_study_runs_nothing_again(done: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in (done / "cells").rglob("measures/*.json")}
    assert main(["reproduce", "table1", *WHERE, str(done)]) == 0
    assert "14 cells, 14 done before" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (done / "cells").rglob("measures/*.json")}


def test_a_lost_measure_is_taken_again_with_the_same_result_and_without_training(done: Path):
    cells = [path.parent for path in (done / "cells").glob("*/run")]
    path = next(iter((cells[0] / "measures").iterdir()))
    before, trained = (
        json.loads(path.read_text(encoding="utf-8")),
        (cells[0] / "run" / "metrics.jsonl").stat().st_mtime_ns,
    )
    path.unlink()
    run_cell(cells[0])
    assert json.loads(path.read_text(encoding="utf-8"))["values"] == before["values"]
    assert (cells[0] / "run" / "metrics.jsonl").stat().st_mtime_ns == trained


def test_a_finished_training_keeps_its_weights_and_not_what_it_would_go_on_from(done: Path):
    runs = [path.parent.parent for path in (done / "cells").glob("*/run/model/model.safetensors")]
    assert runs
    assert not [path for run in runs for path in (run / "checkpoints").iterdir()]


def test_perturbing_names_its_test_and_its_places(done: Path):
    page = (done / "erpo-fig1.md").read_text(encoding="utf-8")
    assert "| replacement | most uncertain | least uncertain | random |" in page
    assert "35.2 %" in page
    rows = _values(done / "erpo-fig1-entropy-of-tokens.csv")
    assert sum(float(r["y"]) for r in rows) == pytest.approx(1.0)


def test_figures_are_drawn_and_their_data_written(done: Path):
    pytest.importorskip("matplotlib")
    for suffix in ("png", "svg"):
        assert (done / f"erpo-fig1-entropy-of-tokens.{suffix}").stat().st_size > 1000


def test_a_cell_that_dies_is_named_with_its_last_words(tmp_path: Path):
    launcher = "bash -c 'echo out of luck; exit 3' --"
    assert main(["reproduce", "erpo-fig2", *WHERE, str(tmp_path), "--launcher", launcher]) == 0
    page = (tmp_path / "erpo-fig2.md").read_text(encoding="utf-8")
    assert "**Missing (lab model):** GRPO, seeds 0, 1; ERPO, seeds 0, 1." in page
    assert "exit code 3, out of luck" in page


def test_a_cell_that_can_not_run_leaves_its_reason_and_lets_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    without_model = [f"model.path={tmp_path}/none", "objective.name=vanilla"]
    wrong_option = Measure(EXAM, "start", {"pupils": 3})
    for name, settings, measure in (
        ("a", without_model, Measure(EXAM)),
        ("b", ["objective.name=vanilla"], wrong_option),
    ):
        write_json(tmp_path / name / "cell.json", Cell(load_config(overrides=settings), (measure,)).to_table())
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "a"), str(tmp_path / "b")])
    assert worker_main() == 2
    assert "no such directory" in (tmp_path / "a" / ERROR).read_text(encoding="utf-8")
    said = (tmp_path / "b" / ERROR).read_text(encoding="utf-8")
    assert said.startswith("TypeError: ")
    assert "pupils" in said


def test_the_papers_scale_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["reproduce", "table1", "--scale", "paper", "--out", str(tmp_path), "model.device=cpu"]
    assert main([*arguments, "--plan", "--model", "Qwen3-4B"]) == 0
    plan = capsys.readouterr().out
    for words in ("7 cells, 0 done; 6 to train", "40.1 Gtokens", "missing: the model Qwen/Qwen3-4B", "DeepMath-103K"):
        assert words in plan
    assert main(arguments) == 2
    assert "missing are\n  the model Qwen/Qwen3-4B" in capsys.readouterr().err


def test_the_plan_of_the_papers_scale_is_the_launcher_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    where = ["--scale", "paper", "--out", str(tmp_path), "--overlay", "topologies/32xh100"]
    assert main(["reproduce", "table3", "table4", *where, "--plan"]) == 0
    plan = capsys.readouterr().out
    assert main(["train", "qwen3-8b", "--overlay", "topologies/32xh100", "--plan", "--device-memory", "79"]) == 0
    told = re.search(r"during training +([\d.]+) GiB", capsys.readouterr().out)
    assert told
    assert f"memory: {float(told[1]):.1f} GiB on each of 16 devices that train" in plan
    assert "beside them 16 rollout workers" in plan
    assert "missing: a static baseline of the model" in plan
    for extra in ("ray", "deepspeed", "vllm"):
        assert importlib.util.find_spec(extra) or f"pip install 'e3rl[{extra}]'" in plan


def test_a_cell_with_ranks_is_trained_by_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`train.workers` start ranks on Ray; here in their place, what they would be asked to do is done in this process."""
    started = []

    def on_ray(config: Config, job: Any, begin: Begin, listener: Any) -> Any:
        started.append((config.train.workers, begin))
        return train_rank(replace(config, train=replace(config.train, workers=0)), begin, listener)

    monkeypatch.setattr(ray_ranks, "train_on_ray", on_ray)
    monkeypatch.setattr("e3rl.cluster.rollouts.generates_elsewhere", lambda config: False)
    settings = [
        "data.train=lab:chain:1",
        "train.steps=1",
        "train.prompts_per_step=2",
        "eval.limit=1",
        "train.workers=2",
    ]
    exam = Measure(EXAM, "steps", {"benchmarks": {"c": "lab:chain:1"}, "problems": 2, "samples": 2})
    cell = Cell(load_config(find_recipe("lab"), overrides=[*settings, "train.minibatches=1"]), (exam,))
    one = load_config(find_recipe("lab"), overrides=[*settings[:-1], "train.minibatches=1"])
    assert cell.address == Cell(one, ()).address, "where a cell is trained does not change what it is"
    for name, budget in (("cell", 0), ("budget", 100)):
        write_json(tmp_path / name / "cell.json", replace(cell, token_budget=budget).to_table())
    run_cell(tmp_path / "cell")
    assert started == [(2, Begin(again=True))]
    assert (tmp_path / "cell" / "run" / "summary.json").exists()
    assert len(list((tmp_path / "cell" / "measures").iterdir())) == 1
    with pytest.raises(UserError, match="a cell with a token budget is trained in one process"):
        run_cell(tmp_path / "budget")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tabel1"], "Did you mean 'table1'?"),
        (["table1", "--jobs", "0"], "--jobs must be at least 1"),
        (["table1", "--scale", "paper", "--model", "Qwen3-8", "--plan"], "Did you mean 'Qwen3-8B'?"),
        (["erpo-fig1", "--launcher", "no-such-program"], "no-such-program can't be run"),
    ],
)
def test_bad_input_is_a_sentence(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["reproduce", *arguments, "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
