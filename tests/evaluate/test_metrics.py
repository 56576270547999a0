"""Avg@k, Pass@k and intervals by value."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.evaluate.evaluation import spread
from e3rl.evaluate.metrics import avg_at_k, bootstrap_interval, pass_at_k, pass_at_k_by_problem
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
