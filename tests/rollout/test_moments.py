"""What is kept of many numbers divides them as they are divided."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.rollout.moments import MARKERS, Distribution, Moments

NUMBERS = st.lists(st.floats(-10, 10), max_size=200)


def test_few_numbers_are_kept_as_they_are():
    distribution = Distribution.of([3.0, 1.0, 2.0])
    assert distribution.markers == (1.0, 2.0, 3.0)
    assert distribution.moments == Moments.of([3.0, 1.0, 2.0])
    assert Distribution.of([2.0]).merged(Distribution.of([3.0, 1.0])).markers == distribution.markers


def test_of_many_numbers_the_middles_of_equal_shares_are_kept():
    # 128 numbers in 64 shares of two: the first of each pair reaches the middle of its share
    assert Distribution.of([float(i) for i in range(128)]).markers == tuple(float(i) for i in range(0, 128, 2))


def test_each_side_counts_as_often_as_it_has_numbers():
    # 640 zeros and 64 ones: ten elevenths of the markers are 0
    merged = Distribution.of([0.0] * 640).merged(Distribution.of([1.0] * 64))
    assert len(merged.markers) == MARKERS
    assert merged.markers.count(0.0) == round(MARKERS * 10 / 11)


@given(NUMBERS)
def test_markers_are_numbers_in_order_near_the_true_quantiles(numbers):
    markers = Distribution.of(numbers).markers
    assert list(markers) == sorted(markers)
    assert set(markers) <= set(numbers)
    assert len(markers) == min(len(numbers), MARKERS)
    for i, marker in enumerate(markers):
        share = (i + 0.5) / len(markers)
        assert sum(x < marker for x in numbers) <= share * len(numbers) <= sum(x <= marker for x in numbers)


@given(NUMBERS)
def test_nothing_merged_changes_nothing(numbers):
    distribution = Distribution.of(numbers)
    assert Distribution().merged(distribution) == distribution == distribution.merged(Distribution())


def test_many_merges_stay_near_the_quantiles_of_all_numbers():
    rng = np.random.default_rng(0)
    batches = rng.lognormal(size=(100, 48))  # heavy-tailed, as U is
    merged = Distribution()
    for batch in batches:
        merged = merged.merged(Distribution.of(batch.tolist()))
    assert merged.moments.count == batches.size
    for share in (0.1, 0.2, 0.5, 0.8, 0.9):
        found = float(np.quantile(merged.markers, share))
        assert float((batches < found).mean()) == pytest.approx(share, abs=0.03)


def test_a_table_and_back():
    distribution = Distribution.of([0.1 * i for i in range(100)])
    assert Distribution.from_table(json.loads(json.dumps(distribution.to_table()))) == distribution
    without = {key: value for key, value in distribution.to_table().items() if key != "markers"}
    assert Distribution.from_table(without) == Distribution(distribution.moments)


@pytest.mark.parametrize("markers", [[2.0, 1.0], [math.nan], ["x"], [0.0, math.inf], 3])
def test_an_impossible_table_is_refused(markers):
    with pytest.raises((TypeError, ValueError)):
        Distribution.from_table({"count": 2, "mean": 1.0, "m2": 0.5, "markers": markers})
