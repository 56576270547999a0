"""Counts and rates of a batch, and the statistics kept beside a model, by value."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.errors import UserError
from e3rl.rollout.moments import Moments
from e3rl.rollout.statistics import FILE_NAME, CalibrationStatistics, entropy_moments, measured_by
from e3rl.rollout.stats import summarise
from e3rl.testing.scripted import Scripted
from tests.rollout.worlds import MEAN_ONLY, levels, roll, rollout

TWO_BY_TWO = rollout(max_segments=2)
TABLE = {
    ("p", 0, 0, 0): 2.0,
    ("p", 0, 0, 1): 0.25,
    ("p", 1, 1, 0): 3.0,
    ("p", 1, 1, 1): 4.0,
    ("p", 1, 1, 2): 5.0,
}


def test_summary():
    groups, _ = roll(levels(TABLE, ends=[("p", 0, 1, 0)]), config=TWO_BY_TWO)
    stats = summarise(groups.values())
    assert (stats.groups, stats.trajectories, stats.stopped) == (1, 2, 1)
    assert (stats.candidates, stats.erasures, stats.forced) == (7, 3, 1)
    assert (stats.committed_tokens, stats.erased_tokens, stats.redrawn_tokens) == (8, 6, 0)
    assert (stats.candidates_N, stats.accepted_N) == ((3, 4), (2, 1))
    assert stats.acceptance_N == pytest.approx((2 / 3, 1 / 4))
    assert (stats.erase_rate, stats.forced_rate, stats.r) == pytest.approx((3 / 7, 1 / 4, 6 / 8))
    assert (stats.stop_rate, stats.mean_length, stats.kept_mass) == (0.5, 4.0, 1.0)


def test_kept_mass_is_a_mean_over_tokens():
    groups, _ = roll(levels({}, ends=[("p", 0, 0, 0)]))
    group = groups["p"]
    first = group.trajectories[0]
    (segment,) = first.segments
    sampled = replace(segment, candidate=replace(segment.candidate, kept_mass=(0.2, 0.6)))
    changed = replace(group, trajectories=(replace(first, segments=(sampled,)), group.trajectories[1]))
    assert summarise([changed]).kept_mass == pytest.approx((0.2 + 0.6 + 6) / 8)


def test_summary_of_plain_rollouts_and_of_nothing():
    groups, _ = roll(levels(TABLE), config=replace(TWO_BY_TWO, erase=False))
    plain, nothing = summarise(groups.values()), summarise([])
    assert (plain.erase_rate, plain.r, plain.acceptance_N) == (0.0, 0.0, (1.0, 1.0))
    assert (nothing.erase_rate, nothing.r, nothing.acceptance_N) == (0.0, 0.0, ())
    assert math.isnan(nothing.kept_mass)


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=5), max_size=5))
def test_merged_moments_are_those_of_all_values(parts):
    merged = Moments()
    for part in parts:
        merged = merged.merged(Moments.of(part))
    values = [v for part in parts for v in part]
    assert merged.count == len(values)
    if values:
        mean = sum(values) / len(values)
        assert merged.mean == pytest.approx(mean, abs=1e-9)
        assert merged.std == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)), abs=1e-6)


def gathered(config=TWO_BY_TWO) -> CalibrationStatistics:
    groups, _ = roll(levels(TABLE), config=config)
    return CalibrationStatistics(measured_by(config, MEAN_ONLY)).including(groups.values())


def test_only_first_candidates_feed_the_reference():
    calibration = gathered()
    assert [m.moments.count for m in calibration.segments] == [2, 2]
    assert [m.moments.mean for m in calibration.segments] == pytest.approx([(2.0 + 0.5) / 2, (0.5 + 3.0) / 2])
    assert [m.moments.std for m in calibration.segments] == pytest.approx([0.75, 1.25])
    assert calibration.entropies == Moments.of([2.0, 2.0, 0.5, 0.5, 0.5, 0.5, 3.0, 3.0])
    assert calibration.at(7) == calibration.segments[1]


def test_batch_entropies_are_of_first_candidates_and_committed_segments():
    groups, _ = roll(levels(TABLE), config=TWO_BY_TWO)
    tokens = [2.0, 0.25, 0.5, 0.5, 3.0, 5.0]
    expected = Moments.of([t for t in tokens for _ in range(2)])
    moments = entropy_moments(groups.values())
    assert (moments.count, moments.mean, moments.std) == pytest.approx((12, expected.mean, expected.std))


def test_merging_references():
    one, longer = gathered(), gathered(rollout(max_segments=3))
    merged = one.merged(longer)
    assert [m.moments.count for m in merged.segments] == [4, 4, 2]
    assert merged.segments[0].moments.mean == pytest.approx(one.segments[0].moments.mean)
    with pytest.raises(UserError, match=r"rollout.segment_length: 2 then, 4 now"):
        gathered(rollout(segment_length=4)).merged(one)


def test_a_setting_that_is_younger_than_the_statistics_had_its_default():
    now = measured_by(rollout(), MEAN_ONLY)
    old = CalibrationStatistics({name: value for name, value in now.items() if name != "erasure.length_exponent"})
    old.check(now)
    with pytest.raises(UserError, match=r"erasure.length_exponent: 0.0 then, 0.5 now"):
        old.check(measured_by(rollout(), replace(MEAN_ONLY, length_exponent=0.5)))


def test_plain_rollouts_have_no_uncertainty_to_learn():
    groups, _ = roll(lambda draw, tokens: Scripted((1.0,) * tokens), config=replace(rollout(), erase=False))
    empty = CalibrationStatistics(measured_by(rollout(), MEAN_ONLY))
    assert empty.including(groups.values()) == empty
    with pytest.raises(UserError, match="e3rl calibrate"):
        empty.at(0)


def test_reference_survives_the_disk(tmp_path):
    calibration = gathered()
    assert calibration.save(tmp_path) == tmp_path / FILE_NAME
    assert CalibrationStatistics.load(tmp_path) == calibration
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_missing_reference_file(tmp_path):
    with pytest.raises(UserError, match=rf"{FILE_NAME} does not exist: make it with 'e3rl calibrate'"):
        CalibrationStatistics.load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tables: "not json",
        lambda tables: "[1, 2]",
        lambda tables: json.dumps(tables | {"format": 99}),
        lambda tables: json.dumps({k: v for k, v in tables.items() if k != "segments"}),
        lambda tables: json.dumps(tables | {"settings": 3}),
        lambda tables: json.dumps(tables | {"segments": [{"count": 1, "mean": "x", "m2": 0}]}),
        lambda tables: json.dumps(tables | {"segments": [{"count": 1, "mean": math.nan, "m2": 0}]}),
        lambda tables: json.dumps(tables | {"entropies": {"count": -1, "mean": 0, "m2": 0}}),
        lambda tables: json.dumps(tables | {"entropies": {"count": 1, "mean": 0, "m2": -1}}),
        lambda tables: json.dumps(tables)[:-20],
    ],
    ids=["text", "list", "format", "no segments", "settings", "word", "nan", "negative count", "negative m2", "cut"],
)
def test_damaged_reference_file(tmp_path, damage):
    (tmp_path / FILE_NAME).write_text(damage(gathered().to_tables()), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{FILE_NAME} is damaged .*e3rl calibrate"):
        CalibrationStatistics.load(tmp_path)
