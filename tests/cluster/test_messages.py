"""What a trainer takes from a worker, and what it refuses, clause by clause."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from e3rl import __version__
from e3rl.cluster.messages import Finished, Hello, check_hello, finished_of, group_of
from e3rl.rollout.group import GroupSettings
from e3rl.types import Candidate
from tests.rollout.worlds import MEAN_ONLY, levels, prompt, roll, rollout

GROUP = roll(levels({("p", 0, 0, 0): 2.0}))[0]["p"]
FINISHED = finished_of(GROUP)
SETTINGS = GroupSettings(rollout(), MEAN_ONLY, seed=7, step=3, policy_version=5)
VOCABULARY = 1_000_001
HELLO = Hello(1, __version__, "abc", rows=4, max_length=20, policy_version=None)


def _with_candidate(**changes: Any) -> Finished:
    """The answer, one candidate changed."""
    first, *others = FINISHED.responses
    segment, *rest = first.segments
    candidate: Candidate = replace(segment.candidate, **changes)
    return replace(
        FINISHED, responses=(replace(first, segments=(replace(segment, candidate=candidate), *rest)), *others)
    )


def test_what_was_asked_for_comes_back_whole():
    assert group_of(FINISHED, prompt("p"), SETTINGS, VOCABULARY) == GROUP


@pytest.mark.parametrize(
    ("finished", "message"),
    [
        (replace(FINISHED, policy_version=4), "rollouts of policy version 4; version 5 was asked for"),
        (replace(FINISHED, responses=FINISHED.responses[:1]), "1 responses of 2"),
        (replace(FINISHED, responses=FINISHED.responses[::-1]), "2 responses of 2"),
        (_with_candidate(ids=(1, 2, 3)), "a candidate of 3 tokens"),
        (_with_candidate(ranks=(1,)), r"a candidate of 2 tokens with \[2, 2, 2, 2, 1\] measures"),
        (_with_candidate(ids=(1, VOCABULARY)), "outside the vocabulary"),
        (_with_candidate(ids=(-1, 1)), "outside the vocabulary"),
        (_with_candidate(entropies=(0.1, math.nan)), "entropies that are no entropies"),
        (_with_candidate(entropies=(0.1, math.inf)), "entropies that are no entropies"),
        (_with_candidate(entropies=(0.1, -0.1)), "entropies that are no entropies"),
    ],
)
def test_what_can_not_be_an_answer_is_refused(finished: Finished, message: str):
    with pytest.raises(ValueError, match=message):
        group_of(finished, prompt("p"), SETTINGS, VOCABULARY)


def test_a_response_is_as_long_as_was_asked_for_at_most():
    short = replace(SETTINGS, rollout=rollout(max_completion_length=5))
    with pytest.raises(ValueError, match="a response of 6 tokens; between 1 and 5 were asked for"):
        group_of(FINISHED, prompt("p"), short, VOCABULARY)


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        (HELLO, None),
        (replace(HELLO, protocol=2), "protocol 2"),
        (replace(HELLO, e3rl="0.0.1"), "it runs e3rl 0.0.1"),
        (replace(HELLO, architecture="xyz"), "another architecture"),
        (replace(HELLO, max_length=19), "its rows hold 19 tokens and the run needs 20"),
        (replace(HELLO, rows=3), "it holds 3 rows and a group needs 4"),
    ],
)
def test_a_worker_that_does_not_fit_is_refused(hello: Hello, message: str | None):
    found = check_hello(hello, "abc", longest=20, siblings=4)
    assert found is None if message is None else message in str(found)
