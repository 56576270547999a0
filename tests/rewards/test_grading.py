"""The answer checker against pairs of every kind, and what it says when it can't say."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from e3rl.rewards.grading import Grade, grade_all
from e3rl.rewards.pool import ProcessPool

PAIRS = [json.loads(line) for line in Path(__file__).with_name("pairs.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    pool = ProcessPool(1, 5.0)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def grades(pool: ProcessPool) -> list[Grade]:
    return grade_all([(pair["gold"], pair["pred"]) for pair in PAIRS], pool)


def test_there_are_enough_pairs_of_every_kind():
    kinds = Counter((pair["kind"], pair["same"]) for pair in PAIRS)
    assert sum(kinds.values()) >= 700
    assert {kind for kind, _ in kinds} >= {
        "number format", "fraction", "decimal", "percent", "currency", "unit", "degree", "set", "tuple", "interval",
        "inequality", "matrix", "equation", "multiple values", "text", "choice", "latex spelling", "expression", "prose",
    }  # fmt: skip
    assert all(kinds[kind, False] >= 3 for kind, _ in kinds)


def test_at_least_97_of_100_pairs_are_right(grades: list[Grade]):
    wrong = [p for p, g in zip(PAIRS, grades, strict=True) if g.correct is not p["same"]]
    assert len(wrong) <= 0.03 * len(PAIRS), wrong


def test_no_near_miss_is_accepted(grades: list[Grade]):
    accepted = [p for p, g in zip(PAIRS, grades, strict=True) if not p["same"] and g.correct is not False]
    assert accepted == []


@pytest.mark.parametrize(
    ("gold", "pred", "correct", "reason"),
    [
        ("5", "The answer is 5.", True, "'5' equals '5'"),
        ("5", "The answer is 6.", False, "'6' is not '5'"),
        ("B", "I choose (C).", False, "'C' is not 'B'"),
        ("5", "\\boxed{", False, "no answer was found in the response"),
        ("5", "<think>it is 5", False, "no answer was found in the response"),
        (None, "5", None, "there is no reference answer to compare with"),
        (" ", "5", None, "there is no reference answer to compare with"),
        ("\\boxed{", "5", None, "the reference holds no answer that can be found"),
        ("5", "\\boxed{" + "1+" * 1500 + "1}", False, "the answer has 3001 characters, more than any reference answer"),
    ],
)
def test_reasons(pool: ProcessPool, gold: str | None, pred: str, correct: bool | None, reason: str):
    assert grade_all([(gold, pred)], pool) == [Grade(correct, reason)]


HANGING = ["9^{9^{9^9}}", "(10^9)!", r"\sum_{k=1}^{10^9} 1/k^2", r"\binom{10^7}{5000000}", "(" * 900 + "1" + ")" * 900]


def test_no_input_takes_longer_than_the_deadline():
    pool = ProcessPool(2, 0.5)
    try:
        grade_all([("x+1", "x+2")], pool)  # workers have started
        began = time.monotonic()
        grades = grade_all([("x^2+1", hanging) for hanging in HANGING], pool)
        assert time.monotonic() - began < len(HANGING) * (0.5 + 1.0 + 5.0)
    finally:
        pool.close()
    assert all(g.correct in (None, False) for g in grades)


@pytest.mark.parametrize(
    "piece",
    [
        "{",
        "}",
        "\\",
        "$",
        "\\(",
        "\\boxed{1}",
        "answer is ",
        "1,1",
        " ",
        "A:",
        "((",
        "1 a",
        "=",
        "\\text{",
        "and ",
        "-",
    ],
)
def test_reading_is_fast_on_any_repetition(piece: str, pool: ProcessPool):
    began = time.process_time()
    grade_all([("1", piece * 3000), ("1", "answer is " + piece * 900), ("1", "\\boxed{" + piece * 900 + "}")], pool)
    assert time.process_time() - began < 5


def test_equal_pairs_are_checked_once(pool: ProcessPool, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    inner = pool.map
    monkeypatch.setattr(pool, "map", lambda tasks: (asked.append(len(tasks)), inner(tasks))[1])
    grades = grade_all([("x+1", "1+x")] * 5 + [("2", "2")], pool)
    assert asked == [2]
    assert [g.correct for g in grades] == [True] * 6
