"""`e3rl grade` on lines that no file can hold as they are."""

from __future__ import annotations

import json
from pathlib import Path

from e3rl.cli import main


def test_halves_of_surrogate_pairs_come_back_escaped(tmp_path: Path) -> None:
    lines = [
        '{"gold": "7", "pred": "\\ud800 \\\\boxed{7}"}',
        '{"gold": "\\udfff", "pred": "7", "note": "\\ud83d"}',
        '{"gold": "é", "pred": "é"}',
    ]
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    assert main(["grade", str(file), "--output", str(out)]) == 0
    written = out.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["correct"] for line in written] == [True, False, True]
    assert json.loads(written[1])["note"] == "\ud83d"
    assert "é" in written[2]


def test_numbers_that_are_too_large_cost_their_line(tmp_path: Path) -> None:
    lines = [
        f'{{"gold": "7", "pred": {"9" * 5000}}}',
        '{"gold": 1e308, "pred": 1e308}',
        '{"gold": "7", "pred": "7"}',
        '{"gold": "7", "pred": NaN}',
    ]
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    assert main(["grade", str(file), "--output", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["correct"] for row in rows] == [None, True, True, False]
    assert rows[0]["reason"].startswith(f"{file}:1: ")


def test_what_counts_without_a_box_can_be_chosen(tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"gold": "7", "pred": pred} for pred in (r"\boxed{7}", "The answer is 7.", "There are 7 of them.")]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for unboxed, expected in (
        ("last", [True, True, True]),
        ("stated", [True, True, False]),
        ("none", [True, False, False]),
    ):
        assert main(["grade", str(file), "--output", str(out), "--unboxed", unboxed]) == 0
        assert [json.loads(line)["correct"] for line in out.read_text().splitlines()] == expected
