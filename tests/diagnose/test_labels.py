"""Which segment holds the first wrong step."""

import pytest

from e3rl.diagnose.labels import knows_steps, labels, require_rewards, wrong_by_steps
from e3rl.errors import UserError
from e3rl.lab.problems import generate
from e3rl.types import Problem

CHAIN = Problem("c", "47+5-8:", "44", {"family": "chain", "question": "47+5-8:"})
RIGHT, SLIPPED = "47+5=52;52-8=44;A:44", "47+5=53;53-8=45;A:45"


def test_a_wrong_step_is_found_in_the_segment_where_it_ends():
    ends = [4, 8, 12, 16, 20]
    assert wrong_by_steps(CHAIN, SLIPPED, ends) == [False, True]  # 47+5=53 ends at character 7
    assert wrong_by_steps(CHAIN, SLIPPED, [4, 7, 12]) == [False, True], "a segment that ends with the step holds it"
    assert wrong_by_steps(CHAIN, RIGHT, ends) == [False] * 5
    assert wrong_by_steps(CHAIN, "47+5=52;52-8=43;A:43", ends) == [False, False, False, True]


def test_without_steps_every_segment_carries_the_answer():
    assert labels(CHAIN, "whatever", [4, 8], right=False, by_steps=False) == [True, True]
    assert labels(CHAIN, "whatever", [4, 8], right=True, by_steps=False) == [False, False]


def test_a_response_that_stops_too_early_is_wrong_where_it_stops():
    assert labels(CHAIN, "47+5=52", [4, 7], right=False, by_steps=True) == [False, True]


def test_lab_problems_know_their_steps_and_others_do_not():
    assert knows_steps(generate("path", 2, "heldout", 2))
    assert not knows_steps([Problem("x", "What is 1 + 1?", "2")])


def test_ungraded_answers_are_refused():
    require_rewards([None, None, "math: no reference answer"])
    with pytest.raises(
        UserError, match=r"only 1 of 3 responses could be graded \(mine: ValueError\): check rewards\.functions"
    ):
        require_rewards([None, "mine: ValueError", "mine: KeyError"])
    with pytest.raises(UserError, match="only 0 of 0"):
        require_rewards([])
