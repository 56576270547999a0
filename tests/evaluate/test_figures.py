"""Figures of hand-made samples, and the comparison at equal tokens."""

from __future__ import annotations

import pytest

from e3rl.errors import UserError
from e3rl.evaluate.figures import equal_budget, equal_samples, figures, mean_figures, reported_ks, samples_for
from tests.evaluate.build import sample

ROWS = [
    [
        sample("a", 0, boxed=True),
        sample("a", 1, correct=False, answer="5", finish="length", tokens=20, generated=30, erasures=1),
    ],
    [
        sample("b", 0, correct=None, answer=None, tokens=30, generated=40, erasures=1),
        sample("b", 1, correct=False, answer="7"),
    ],
]


def test_figures_by_hand():
    found = figures("plain", ROWS)
    assert found["avg@2"] == 0.25
    assert found["pass@2"] == 0.5
    assert (found["problems"], found["samples"], found["missing"]) == (2, 2, 1)
    assert found["tokens"] == 90
    assert found["tokens_per_correct"] == 90
    assert found["finish_ratio"] == 0.75
    assert found["boxed"] == 0.25
    assert found["length"] == 17.5
    assert found["r"] == pytest.approx(20 / 70)
    assert found["erase_rate"] == pytest.approx(2 / 10)
    assert {k: v["value"] for k, v in found["pass"].items()} == {"1": 0.25, "2": 0.5}
    assert found["maj"]["2"]["value"] == 0.25  # of a's two answers either; b's only answer is wrong


def test_nothing_right_costs_no_number():
    assert figures("plain", [[sample("a", 0, correct=False)]])["tokens_per_correct"] is None


def test_the_ks_that_are_reported():
    assert reported_ks(8) == [1, 2, 4, 8]
    assert reported_ks(12) == [1, 2, 4, 8, 12]
    assert reported_ks(300)[-2:] == [256, 300]
    assert reported_ks(8, (8, 3)) == [3, 8]
    with pytest.raises(
        UserError, match=r"Pass@64 needs at least 64 samples of each problem, and there are 8: raise eval"
    ):
        reported_ks(8, (64,))


def test_an_equal_budget_by_hand():
    plain = [[sample(p, i, correct=i == 0) for i in range(4)] for p in "ab"]
    # 2 erasable samples a problem cost 30 tokens: as much as 3 plain ones of 10
    erasable = [[sample(p, i, mode="erasable", correct=True, generated=15) for i in range(2)] for p in "ab"]
    budget = equal_samples([row[:2] for row in plain], erasable)
    assert budget == 3.0
    found = equal_budget(plain, erasable, budget)
    assert found["tokens_per_problem"] == 30
    assert (found["erasable_samples"], found["plain_samples"]) == (2, 3.0)
    assert found["pass"]["erasable"] == 1.0
    assert found["pass"]["plain"] == pytest.approx(0.75)  # 1 of 4 is right: chance that 3 drawn hold it
    assert found["avg"]["plain"] == 0.25
    assert found["avg"]["difference"]["mean"] == 0.75
    assert found["avg"]["difference"]["p"] == 0.5  # two problems that differ by the same: ++ and -- of four


def test_a_budget_between_whole_samples_is_in_between():
    plain = [[sample("a", i, correct=i == 0) for i in range(4)]]
    erasable = [[sample("a", i, mode="erasable", generated=25 if i else 10) for i in range(2)]]
    budget = equal_samples([row[:2] for row in plain], erasable)
    assert budget == 3.5
    assert samples_for(budget) == 4
    assert equal_budget(plain, erasable, budget)["pass"]["plain"] == pytest.approx((0.75 + 1.0) / 2)
    assert equal_budget(plain, erasable, 3.25)["pass"]["plain"] == pytest.approx(0.75 * 0.75 + 0.25 * 1.0)


def test_a_budget_below_one_sample():
    erasable = [[sample("a", 0, mode="erasable", generated=5)]]
    assert equal_budget([[sample("a", 0)]], erasable, 0.5)["pass"]["plain"] == pytest.approx(0.5)


def test_a_mean_counts_every_benchmark_the_same():
    other = [[sample(p, i, correct=True, tokens=8, generated=12) for i in range(2)] for p in "cdef"]
    one, two = figures("plain", ROWS), figures("plain", other)
    found = mean_figures([one, two])
    assert found.keys() == one.keys()
    assert found["avg@2"] == (0.25 + 1.0) / 2
    assert found["pass@2"] == found["pass"]["2"]["value"] == 0.75
    assert (found["problems"], found["samples"], found["missing"], found["tokens"]) == (6, 2, 1, 90 + 96)
    assert found["tokens_per_correct"] == 186 / 9
    assert found["length"] == (17.5 + 8) / 2
    # the second benchmark has no spread: the halves of the first's interval are halved
    assert found["ci95"] == [0.625 - (0.25 - one["ci95"][0]) / 2, 0.625 + (one["ci95"][1] - 0.25) / 2]


def test_intervals_of_independent_benchmarks_add_in_quadrature():
    record = figures("plain", ROWS)
    found = mean_figures([record, record])
    half = record["avg@2"] - record["ci95"][0]
    assert found["avg@2"] - found["ci95"][0] == pytest.approx(half / 2**0.5)
