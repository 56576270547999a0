"""Every answer in other spellings, and made wrong in many ways: the generators of benchmarks/checker.py on a small file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.checker import measure, plainly_equal
from e3rl.rewards.pool import ProcessPool

GOLDS = [json.loads(line)["answer"] for line in Path(__file__).with_name("golds.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def measured() -> tuple[Counter[tuple[str, bool]], list[tuple[str, str, str, bool]]]:
    pool = ProcessPool(1, 5.0)
    try:
        return measure(GOLDS, pool, 60)
    finally:
        pool.close()


def test_no_near_miss_is_accepted(measured: tuple[Counter[tuple[str, bool]], list[tuple[str, str, str, bool]]]) -> None:
    counts, misjudged = measured
    assert [case for case in misjudged if not case[3]] == []
    kinds = {kind for kind, same in counts if not same}
    assert kinds >= {
        "+ 1",
        "sign",
        "swapped",
        "part",
        "another",
        "in a list",
        "word",
        "denied",
        "nearly",
        "case",
        "digit",
        "equation",
        "taken back",
    }
    assert sum(n for (_, same), n in counts.items() if not same) > 1200


def test_every_spelling_is_accepted(
    measured: tuple[Counter[tuple[str, bool]], list[tuple[str, str, str, bool]]],
) -> None:
    counts, misjudged = measured
    assert [case for case in misjudged if case[3]] == []
    assert sum(n for (_, same), n in counts.items() if same) > 600


def test_the_generators_know_what_is_equal_after_all() -> None:
    assert plainly_equal(r"\frac{1}{2}", "1/2")
    assert plainly_equal(r"10\;\text{edges}", "10")
    assert plainly_equal(r"35\%", "0.35")
    assert not plainly_equal("2", "-2")
    assert not plainly_equal(r"\frac{1}{2}", r"\frac{2}{1}")
