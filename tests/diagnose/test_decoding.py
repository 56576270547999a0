"""Votes and the cross-fitted contest, by hand."""

import numpy as np
import pytest

from e3rl.config import load_config
from e3rl.diagnose.decoding import LATE_EPS, SETTINGS, Decoding, calmest_half, contest, majority, overrides
from e3rl.diagnose.statistics import UNKNOWN


def decoding(name, kind, correct, tokens=10.0, passed=None):
    return Decoding(name, kind, 1.0, tokens, UNKNOWN, UNKNOWN, tuple(correct), tuple(passed or correct))


def test_the_commonest_answer_wins_and_of_equals_the_first():
    answers = [["4", "7", "7"], ["1", "2", "1"], ["5", "6", "8"]]
    correct = np.array([[True, False, False], [True, False, True], [False, True, False]])
    assert majority(answers, correct).tolist() == [[False], [True], [False]]


def test_the_calmer_half_is_the_one_of_least_entropy():
    entropies = np.array([[0.1, 0.9, 0.4, 0.0], [0.9, 0.9, 0.1, 0.1]])
    correct = np.array([[True, False, False, False], [False, True, True, False]])
    assert calmest_half(entropies, correct).tolist() == [[False, True], [True, False]]


def test_the_contest_chooses_on_the_other_half():
    """Each setting shines on one half. Chosen there and shown on the other, it does not."""
    even, odd = decoding("even", "erasable", [1, 0, 1, 0], 30.0), decoding("odd", "erasable", [0, 1, 0, 1], 20.0)
    plain = decoding("plain", "plain", [0.5, 0.5, 0.5, 0.5])
    fight = contest([plain, even, odd])
    assert fight.erasable == ("odd", "even")  # shown on even problems, then on odd ones
    assert fight.avg.value == -0.5
    assert fight.tokens == pytest.approx(2.5)


def test_the_settings_of_a_way_to_decode_are_those_that_make_it():
    config = load_config(None, (), ["rollout.segment_length=8", "rollout.max_segments=2", "erasure.base_weight=1.0"])
    way = SETTINGS[LATE_EPS].applied(config)
    found = overrides(config, way, 0.6)
    assert {"rollout.temperature=0.6", "eval.temperature=0.6", "erasure.baseline=quantile"} <= set(found)
    assert "erasure.base_weight=1.0" not in found  # as it was
    again = load_config(None, (), ["rollout.segment_length=8", "rollout.max_segments=2", *found])
    assert overrides(again, way, 0.6) == ()
    assert (again.rollout.segment_length, again.erasure) == (16, way.erasure)


def test_the_contest_is_between_erasable_and_plain_alone():
    vote = decoding("vote", "majority", [1, 1, 1, 1])
    plain, erasable = decoding("plain", "plain", [0, 1, 0, 1]), decoding("erasable", "erasable", [1, 1, 0, 1])
    fight = contest([plain, vote, erasable])
    assert fight.plain == ("plain", "plain")
    assert fight.avg.value == 0.25
