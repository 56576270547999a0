"""`e3rl decode` and `e3rl eval` with a tool, end to end on the embedded model that calls one."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from e3rl.cli import main
from e3rl.lab.books import Books
from e3rl.lab.problems import generate
from e3rl.types import Problem

BOOKS = ["environments.factory=books", "model.device=cpu"]


def replayed(problem: Problem, calls: list[dict[str, str]]) -> list[str]:
    """What a fresh environment answers to the same calls."""
    books, found = Books(), []
    books.reset(**problem.columns)
    for call in calls:
        try:
            found.append(books.book(**json.loads(call["arguments"])))
        except (TypeError, ValueError) as error:
            found.append(str({"error": str(error)}))
    return found


@pytest.mark.parametrize("level", [[], ["environments.erase=errors"]], ids=["A", "A and B"])
def test_decode_calls_the_tool_and_shows_what_it_answered(capsys: pytest.CaptureFixture[str], level: list[str]):
    problem = generate("books", 4, "heldout", 1)[0]
    row = {name: problem.columns[name] for name in ("operations", "question", "checked")}
    asked = [str(problem.prompt), "--row", json.dumps(row), "--samples", "4", "run.seed=1"]
    assert main(["decode", "lab-tools", *asked, "--json", *BOOKS, *level]) == 0
    samples = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(samples) == 4
    called = 0
    for sample in samples:
        seen = [json.loads(s["observation"]) for s in sample["segments"] if s["observation"]]
        calls = [call for observation in seen for call in observation["calls"] if call["name"] == "book"]
        assert [c["result"] for c in calls] == replayed(problem, calls)
        called += len(calls)
    assert called >= 12
    assert main(["decode", "lab-tools", *asked, *BOOKS, *level]) == 0
    shown = capsys.readouterr().out
    assert 'book({"sum": ' in shown
    assert " → " in shown


def test_decode_has_a_problem_of_its_own_for_the_books(capsys: pytest.CaptureFixture[str]):
    assert main(["decode", "lab-tools", "--samples", "2", "--plain", *BOOKS]) == 0
    assert str(generate("books", 4, "heldout", 1)[0].prompt) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["47+5:", "--row", "{}"], "--row is for an environment"),
        (["47+5:", "--row", "[]", *BOOKS], "--row must be a JSON object"),
        (["47+5:", "--samples", "2", *BOOKS], "reset() fails on problem 'prompt-0'"),
    ],
)
def test_decode_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], why: str):
    assert main(["decode", "lab-tools", *arguments]) == 2
    assert why in capsys.readouterr().err


def test_eval_grades_what_was_answered_with_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sizes = ["eval.limit=6", "eval.num_samples=4", "run.seed=3"]
    assert main(["eval", "lab-tools", "lab:books:1", "--output", str(tmp_path / "out"), *sizes, *BOOKS]) == 0
    rows = [row for path in (tmp_path / "out").rglob("samples.parquet") for row in pq.read_table(path).to_pylist()]
    assert len(rows) >= 24
    right = [row for row in rows if row["correct"]]
    assert 0 < len(right) < len(rows)
    assert all(row["segments"] >= 4 for row in right), "no answer is known without three calls"
    assert all(row["calls"] >= 3 for row in right), "and no fewer are counted"
    assert sum(row["failed_calls"] for row in rows) > 0
    [figures] = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("evaluation.json")]
    plain = figures["plain"]
    mine = [row for row in rows if row["mode"] == "plain"]
    assert plain["calls"] == pytest.approx(sum(row["calls"] for row in mine) / len(mine))
    assert plain["call_errors"] == pytest.approx(
        sum(row["failed_calls"] for row in mine) / sum(row["calls"] for row in mine)
    )
    said = capsys.readouterr().out
    assert "lab-tools on lab:books:1" in said
    assert f"{plain['calls']:.1f}: {plain['call_errors']:.0%}" in said
