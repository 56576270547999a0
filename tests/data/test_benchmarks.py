"""Benchmarks by name: whole files of any common shape are read, others refused in a sentence; overlaps with training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from e3rl.config import DataConfig
from e3rl.data.benchmarks import BENCHMARKS, content_digest, load_benchmark
from e3rl.data.contamination import Overlap, overlap_notes, overlaps
from e3rl.data.loading import load_problems
from e3rl.errors import UserError
from e3rl.types import Message, Problem, Prompt


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"problem": f"What is {i} + {i}?", "answer": str(2 * i), **fields} for i in range(count)]


def error(name: str, directory: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load_benchmark(name, str(directory))
    return str(caught.value)


def test_the_sizes_are_those_of_the_papers():
    sizes = {name: benchmark.count for name, benchmark in BENCHMARKS.items()}
    assert sizes == {
        "aime24": 30, "aime25": 30, "aime26": 30, "amc23": 40, "math500": 500, "minerva": 272, "olympiadbench": 675,
        "gsm8k": 1319,
    }  # fmt: skip
    assert all(len(benchmark.digest) == 64 for benchmark in BENCHMARKS.values())


def test_a_local_file_is_found_under_its_usual_names(tmp_path: Path):
    write(tmp_path / "aime_2024.jsonl", rows(30))
    loaded = load_benchmark("aime24", str(tmp_path))
    assert [p.id for p in loaded.problems][:2] == ["aime24-0", "aime24-1"]
    assert loaded.problems[3] == Problem("aime24-3", "What is 3 + 3?", "6", {})
    assert not loaded.known
    config = DataConfig(directory=str(tmp_path))
    assert load_problems("aime24", config=config, split="eval") == list(loaded.problems)


@pytest.mark.parametrize(
    ("name", "row", "answer"),
    [
        ("gsm8k", {"question": "q", "answer": "2 + 2 = <<2+2=4>>4\nso 1,004\n#### 1,004"}, "1004"),
        ("aime24", {"problem": "q", "answer": "033"}, "33"),
        ("aime25", {"problem": "q", "answer": 70}, "70"),
        ("amc23", {"question": "q", "answer": 27.0}, "27"),
        ("amc23", {"question": "q", "answer": "27.0"}, "27"),
        ("minerva", {"problem": "q", "solution": r"Hence \boxed{1.6} cm."}, "1.6"),
        ("olympiadbench", {"question": "q", "final_answer": ["$\\frac{1}{2}$"]}, r"\frac{1}{2}"),
        ("olympiadbench", {"question": "q", "final_answer": ["$2$", "$-1$"]}, "2, -1"),
        ("math500", {"problem": "q", "answer": "p - q", "solution": r"\boxed{other}"}, "p - q"),
    ],
)
def test_answers_in_the_forms_that_copies_have(tmp_path: Path, name: str, row: dict[str, Any], answer: str):
    benchmark = BENCHMARKS[name]
    write(tmp_path / f"{benchmark.files[0]}.jsonl", [{**row, "id": str(i)} for i in range(benchmark.count)])
    assert {p.answer for p in load_benchmark(name, str(tmp_path)).problems} == {answer}


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path):
    file = write(tmp_path / "aime24.jsonl", rows(29))
    assert f"{file}: AIME 2024 has 30 problems, and this holds 29" in error("aime24", tmp_path)
    write(file, [*rows(29), {"problem": "x"}])
    assert f"{file}:30: 'aime24' needs one of the columns answer, final_answer" in error("aime24", tmp_path)
    write(file, rows(30, id="same"))
    assert f"{file}:2: id 'same' is already the id of {file}:1" in error("aime24", tmp_path)
    write(file, [*rows(29), {"problem": "x", "answer": []}])
    assert "the list of answers is empty" in error("aime24", tmp_path)
    message = error("amc23", tmp_path)
    assert "has no file for 'amc23': expected amc23.jsonl" in message
    assert "Benchmarks found there: aime24" in message
    assert "there is no directory" in error("amc23", tmp_path / "none")


def test_a_name_nearly_that_of_a_benchmark_is_no_hub_dataset():
    with pytest.raises(UserError, match=r"unknown benchmark 'aime27'. Did you mean 'aime2") as caught:
        load_problems("aime27", config=DataConfig(), split="eval")
    assert "math500" in str(caught.value)


def test_without_a_hub_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch):
    import datasets

    def offline(name: str, subset: str | None, *, split: str) -> Any:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        UserError, match=r"'math-ai/amc23'.*can't be reached.*--data-dir DIR, or data.directory, with amc23"
    ):
        load_benchmark("amc23")


def test_the_digest_sees_content_and_not_typography():
    one = [Problem("a", "What is  $1+1$?", "2"), Problem("b", "And 2 + 2 ?", "4")]
    two = [Problem("x", "and 2+2", " 4"), Problem("y", "What is 1 + 1?", "2")]
    assert content_digest(one) == content_digest(two)
    assert content_digest(one) != content_digest([one[0], Problem("b", "And 2 + 2 ?", "5")])
    assert content_digest(one) != content_digest([one[0], Problem("b", "And 2 + 3 ?", "4")])


LONG = (
    "A farmer has {} sheep and twice as many goats and every day sells three of them at the market for nine coins each "
    "until none is left"
)


def test_overlaps_of_all_three_kinds():
    training = [
        Problem("t0", "Find x."),
        Problem("t1", "FIND  $y$!"),
        Problem("t2", LONG.format(12) + ". How many days does it take?"),
        Problem("t3", (Message("system", "be brief"), Message("user", "Add 1 and 1"))),
    ]
    benchmark = [
        Problem("b0", "Find x."),
        Problem("b1", "Find y"),
        Problem("b2", LONG.format(12) + "! When?"),
        Problem("b3", "Add 1 and 1"),
        Problem("b4", "Something else entirely"),
    ]
    assert overlaps(training, benchmark) == [
        Overlap("b0", "t0", "exact"),
        Overlap("b1", "t1", "normalised"),
        Overlap("b2", "t2", "13-gram"),
        Overlap("b3", "t3", "exact"),
    ]


def test_a_phrase_that_many_training_problems_have_is_no_overlap():
    phrase = "the value can be written as m over n where m and n are relatively prime positive integers find m plus n"
    training = [Problem(f"t{i}", f"Let {i} be a number with {i * 7} properties, {phrase}") for i in range(12)]
    assert overlaps(training, [Problem("b", phrase)]) == []
    assert len(overlaps(training[:5], [Problem("b", phrase)])) == 1


def test_the_note_before_training():
    training, held_out = [Prompt(Problem("t", "Find x."), (1,))], [Prompt(Problem(i, "Find x."), (1,)) for i in "ab"]
    (note,) = overlap_notes(DataConfig(train="a.jsonl"), training, {"b.jsonl": held_out, "c.jsonl": []})
    assert note.startswith("2 of the 2 problems of b.jsonl are in the training data a.jsonl (2 exact)")
    assert overlap_notes(DataConfig(train="lab:chain"), training, {"lab:chain": held_out}) == []
    assert overlap_notes(DataConfig(train="a.jsonl"), training, {}) == []
