"""`e3rl eval`, `e3rl compare` and `e3rl grade` as they are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from e3rl.cli import main
from e3rl.config import DataConfig
from e3rl.data.loading import load_problems
from e3rl.lab.problems import grade

SMALL = [
    "eval", "lab", "lab:chain:1", "--erase", "eval.limit=3", "eval.num_samples=2", "rewards.functions=['lab']", "--recipe",
    "demo",
]  # fmt: skip


def rows(directory: Path) -> list[dict[str, Any]]:
    lines = [line for path in sorted(directory.glob("samples*.jsonl")) for line in path.read_text().splitlines()]
    return sorted(map(json.loads, lines), key=lambda r: (r["mode"], r["problem"], r["sample"]))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("eval") / "done"
    assert main([*SMALL, "--output", str(directory)]) == 0
    return directory


def test_everything_is_written(done: Path):
    figures = json.loads((done / "evaluation.json").read_text())
    assert figures["data"] == "lab:chain:1"
    assert 0 <= figures["plain"]["avg@2"] <= figures["plain"]["pass@2"] <= 1
    assert figures["equal_budget"]["erasable_samples"] == 2
    assert figures["identity"]["decoding"]["num_samples"] == 2
    table = pq.read_table(done / "samples.parquet").to_pylist()
    assert len(table) == len(rows(done)) >= 12
    assert {"gold", "pred", "correct", "reason", "tokens", "generated"} <= table[0].keys()


def test_an_interrupted_evaluation_goes_on_exactly(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = rows(done)
    half = tmp_path / "half"
    half.mkdir()
    (half / "identity.json").write_bytes((done / "identity.json").read_bytes())
    stream = (done / "samples.jsonl").read_bytes()
    (half / "samples.jsonl").write_bytes(stream[: len(stream) // 2])
    assert main([*SMALL, "--output", str(half), "--stop-after", "0"]) == 130
    assert "groups to go; go on with the same command" in capsys.readouterr().err
    assert main([*SMALL, "--output", str(half)]) == 0
    assert rows(half) == before
    assert (half / "evaluation.json").read_text() == (done / "evaluation.json").read_text()


def test_lab_problems_are_graded_by_the_lab(tmp_path: Path):
    """Of a graph's ways every right one counts, and no other that algebra would take for it."""
    arguments = ["eval", "lab", "lab:path:2", "eval.limit=24", "eval.num_samples=4", "--output", str(tmp_path)]
    assert main(arguments) == 0
    problems = {p.id: p for p in load_problems("lab:path:2", config=DataConfig(), split="eval")}
    found = rows(tmp_path)
    assert all(row["correct"] == grade(problems[row["problem"]], row["pred"]) for row in found)
    assert any(row["correct"] and row["pred"] != row["gold"] for row in found)  # another way than the reference


def test_more_samples_than_rows_are_drawn_in_rounds(tmp_path: Path):
    """32 samples of a problem where the bound on the KV cache leaves 15 rows."""
    settings = (
        "eval.limit=2 eval.num_samples=32 rollout.segment_length=8 rollout.max_segments=6 rollout.num_generations=4 "
        "rollout.kv_budget=2"
    )
    assert main(["eval", "lab", "lab:chain:1", *settings.split(), "--output", str(tmp_path / "few")]) == 0
    unbounded = settings.replace("num_generations=4", "num_generations=32").replace("kv_budget=2", "kv_budget=0")
    assert main(["eval", "lab", "lab:chain:1", *unbounded.split(), "--output", str(tmp_path / "many")]) == 0
    kept = ("problem", "sample", "pred", "correct")
    few, many = ([{k: row[k] for k in kept} for row in rows(tmp_path / name)] for name in ("few", "many"))
    assert len(few) == 64
    assert few == many


def test_shards_are_the_whole(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*SMALL, "--output", str(tmp_path), "--shard", "2/2"]) == 0
    assert "This shard is done; others are not" in capsys.readouterr().out
    assert main([*SMALL, "--output", str(tmp_path), "--shard", "1/2"]) == 0
    assert main([*SMALL, "--output", str(tmp_path)]) == 0
    assert rows(tmp_path) == rows(done)


def test_worker_processes(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plain = [argument for argument in SMALL if argument != "--erase"]
    assert main([*plain, "--output", str(tmp_path / "two"), "--workers", "2"]) == 0
    assert {p.name for p in (tmp_path / "two").glob("*.jsonl")} == {"samples-1of2.jsonl", "samples-2of2.jsonl"}
    assert rows(tmp_path / "two") == [row for row in rows(done) if row["mode"] == "plain" and row["round"] == 0]
    assert main([*SMALL, "--output", str(done), "--workers", "2", "eval.temperature=0.5"]) == 2
    assert "they are not mixed" in capsys.readouterr().err


def test_other_sampling_is_not_mixed_in(done: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*SMALL, "--output", str(done), "eval.temperature=0.5"]) == 2
    assert "decoding.temperature: 1.0 there, 0.5 now): they are not mixed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["eval", "lab", "aime24", "--data-dir", "."], "has no file for 'aime24'"),
        (["eval", "lab", "amie24"], "Did you mean 'aime24'?"),
        (["eval", "lab", "lab:chain:1", "--k", "64"], "Pass@64 needs at least 64 samples"),
        (["eval", "lab", "lab:chain:1", "--shard", "3/2"], "write I/N"),
        (["eval", "lab", "lab:chain:1", "--workers", "2", "--shard", "1/2"], "give one of them"),
        (["eval", "lab", "lab:chain:1", "--workers", "0"], "--workers must be at least 1"),
        (["eval", "no/such/model/here", "lab:chain:1"], "no such directory"),
        (["grade", "none.jsonl"], "no such file: none.jsonl"),
        (["compare", "none", "none"], "there is no directory none"),
    ],
)
def test_bad_input_is_a_sentence(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_compare_prints_a_table_and_json(done: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", str(done), str(done), "--mode", "erasable", "--mode-b", "plain"]) == 0
    assert "Pass@2" in capsys.readouterr().out
    assert main(["compare", str(done), str(done), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["Avg"]["difference"]["p"] == 1.0


def test_grade_adds_its_verdict_and_survives_bad_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "in.jsonl"
    lines = [
        json.dumps({"gold": "5", "pred": "so it is 5", "id": 1}), "{bad", "", json.dumps({"gold": 3}), json.dumps([1]),
        json.dumps({"gold": 0.5, "pred": "1/2"}), json.dumps({"gold": None, "pred": "4"}), json.dumps({"gold": "4", "pred": "5"}),
    ]  # fmt: skip
    file.write_bytes("\n".join(lines).encode() + b"\n\xff\n")
    out = tmp_path / "out.jsonl"
    assert main(["grade", str(file), "--output", str(out)]) == 0
    graded = list(map(json.loads, out.read_text().splitlines()))
    assert [g["correct"] for g in graded] == [True, None, None, None, True, None, False, None]
    assert graded[0] == {"gold": "5", "pred": "so it is 5", "id": 1, "correct": True, "reason": "'5' equals '5'"}
    assert graded[1]["reason"].startswith(f"{file}:2: malformed JSON")
    assert graded[2]["reason"] == f"{file}:4: no field 'pred'; fields found: gold"
    assert "expected an object with 'gold' and 'pred', got list" in graded[3]["reason"]
    assert "'gold' must be a string or a number, got NoneType" in graded[5]["reason"]
    assert graded[7]["reason"] == f"{file}:9: not valid UTF-8"
    assert "8 lines: 2 right, 1 wrong, 5 can't be said" in capsys.readouterr().err
    assert main(["grade", str(file), "--output", str(file)]) == 2
    assert main(["grade", str(file), "--timeout", "0"]) == 2
