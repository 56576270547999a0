"""Avg@k, Pass@k and intervals by value."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.data.loading import spread
from e3rl.evaluate.metrics import (
    avg_at_k,
    bootstrap_interval,
    maj_at_k,
    paired_difference,
    pass_at_k,
    pass_at_k_by_problem,
)
from e3rl.types import Problem

TABLE = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=bool)


def test_avg_and_pass_by_hand():
    assert avg_at_k(TABLE).tolist() == [0.25, 0.5, 0.0]
    assert pass_at_k_by_problem(TABLE, 1).tolist() == pytest.approx([0.25, 0.5, 0.0])
    # 2 of 4 drawn: 1 - C(3,2)/C(4,2) = 1 - 3/6; 1 - C(2,2)/C(4,2) = 1 - 1/6
    assert pass_at_k_by_problem(TABLE, 2).tolist() == pytest.approx([0.5, 5 / 6, 0.0])
    assert pass_at_k_by_problem(TABLE, 4).tolist() == [1.0, 1.0, 0.0]


def test_more_samples_than_there_are_is_refused():
    with pytest.raises(ValueError, match="Pass@5 needs at least 5 samples"):
        pass_at_k(1, 4, 5)


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_one(samples: list[bool], data: st.DataObject):
    k = data.draw(st.integers(1, len(samples)))
    draws = list(itertools.combinations(samples, k))
    assert pass_at_k(sum(samples), len(samples), k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


def test_the_interval_of_equal_values_is_that_value():
    assert bootstrap_interval(np.full(20, 0.3)) == pytest.approx((0.3, 0.3))


def test_the_interval_is_about_two_standard_errors_each_way():
    values = np.array([0.0, 1.0] * 200)
    low, high = bootstrap_interval(values)
    error = 0.5 / math.sqrt(400)
    assert low == pytest.approx(0.5 - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(0.5 + 1.96 * error, abs=0.3 * error)


def test_a_limited_evaluation_sees_all_of_the_data():
    problems = [Problem(str(i), "x") for i in range(10)]
    assert [p.id for p in spread(problems, 4)] == ["0", "2", "5", "7"]
    assert spread(problems, 0) == spread(problems, 10) == spread(problems, 99) == problems
    assert spread([], 3) == []


def test_maj_by_hand():
    answers, correct = ["4", "4", "5", None], [True, True, False, False]
    assert maj_at_k(answers, correct, 4) == 1.0
    assert maj_at_k(answers, correct, 1) == 0.5
    assert maj_at_k(["4", "5"], [True, False], 2) == 0.5  # a tie is shared
    assert maj_at_k([None, None], [False, False], 2) == 0.0
    assert maj_at_k(["4", None, None], [True, True, False], 1) == pytest.approx(
        1 / 3
    )  # without an answer there is no vote
    assert maj_at_k(["5", "5", "4"], [False, False, True], 3) == 0.0
    with pytest.raises(ValueError, match="Maj@3 needs at least 3 samples"):
        maj_at_k(["4", "5"], [True, False], 3)


def test_maj_at_k_is_the_mean_over_draws():
    answers, correct = ["4", "4", "4", "5", "5", "6"], [True, True, True, False, False, False]
    draws = list(itertools.combinations(range(6), 3))

    def vote(chosen: tuple[int, ...]) -> float:
        counts = {a: sum(answers[i] == a for i in chosen) for a in {answers[i] for i in chosen}}
        winners = [a for a, n in counts.items() if n == max(counts.values())]
        return sum(a == "4" for a in winners) / len(winners)

    assert maj_at_k(answers, correct, 3) == pytest.approx(sum(map(vote, draws)) / len(draws), abs=0.05)


def test_the_sign_test_by_hand():
    # three problems better by the same: all 8 changes of sign, two of them (+++ and ---) as far from 0
    difference = paired_difference(np.array([1.0, 1.0, 1.0]), np.array([0.0, 0.0, 0.0]))
    assert (difference.mean, difference.p, difference.problems) == (1.0, 0.25, 3)
    assert paired_difference(np.ones(4), np.ones(4)).p == 1.0
    assert paired_difference(np.array([1.0, 0.0]), np.array([0.0, 1.0])).p == 1.0


def test_many_problems_are_tested_by_random_signs():
    rng = np.random.default_rng(0)
    same = paired_difference(rng.random(60), rng.random(60))
    better = paired_difference(rng.random(60) + 0.5, rng.random(60))
    assert same.p > 0.05
    assert 0 < better.p < 0.001
    few = paired_difference(np.array([1.0] * 13 + [-1.0] * 7), np.zeros(20))
    assert few.p == pytest.approx(0.2632, abs=0.02)  # 2 P(13 or more heads of 20)
    assert better.interval[0] > 0.3


def test_the_interval_of_a_difference_is_that_of_the_problems_differences():
    """Problems differ much among each other and all by 0.1 between the runs: pairs leave no doubt."""
    spread_P = np.linspace(0.0, 0.9, 30)
    difference = paired_difference(spread_P + 0.1, spread_P)
    assert difference.interval == pytest.approx((0.1, 0.1))
    crossed = paired_difference(spread_P[::-1], spread_P)
    assert crossed.interval[1] - crossed.interval[0] > 0.3


def test_a_comparison_of_different_problems_is_refused():
    with pytest.raises(ValueError, match="the same problems on both sides"):
        paired_difference(np.ones(3), np.ones(4))
