"""What a trainer takes from a worker, and what it refuses, clause by clause."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from e3rl import __version__
from e3rl.cluster.messages import PROTOCOL, Hello, check_hello, group_of
from e3rl.rollout.columns import SCHEMA, encode
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.ipc import from_ipc, to_ipc
from e3rl.types import COLUMNS
from tests.rollout.worlds import MEAN_ONLY, levels, prompt, roll, rollout

GROUP = roll(levels({("p", 0, 0, 0): 2.0}))[0]["p"]
SETTINGS = GroupSettings(rollout(), MEAN_ONLY, seed=7, step=3, policy_version=5)
VOCABULARY = 1_000_001
HELLO = Hello(PROTOCOL, __version__, "abc", rows=4, max_length=20, policy_version=None, node="")


def _changed(change: Callable[[list[dict[str, Any]]], Any]) -> pa.RecordBatch:
    """The group's rows after a change to them."""
    rows = encode([GROUP]).to_pylist()
    change(rows)
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def _candidate(**changes: Any) -> pa.RecordBatch:
    """The group, one candidate changed."""
    return _changed(lambda rows: rows[0]["segments"][0].update(changes))


def _erased(**changes: Any) -> pa.RecordBatch:
    """The group, its erasure changed."""
    return _changed(lambda rows: rows[0]["erasures"][0].update(changes))


def _shorter(**changes: Any) -> pa.RecordBatch:
    """The group, its erasure changed and its first response one segment long."""

    def change(rows: list[dict[str, Any]]) -> None:
        rows[0]["erasures"][0].update(changes)
        del rows[0]["segments"][1:]

    return _changed(change)


def test_what_was_asked_for_comes_back_whole():
    assert GROUP.trajectories[0].erasures
    assert group_of(encode([GROUP]), prompt("p"), SETTINGS, VOCABULARY) == GROUP


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (_changed(lambda rows: rows[1].update(policy_version=4)), "policy version {4, 5}; version 5 was asked for"),
        (_changed(lambda rows: rows[1].update(policy_version=None)), "version 5 was asked for"),
        (_changed(lambda rows: rows.pop()), "1 responses of 2"),
        (_changed(lambda rows: rows.reverse()), "2 responses of 2"),
        (_changed(lambda rows: rows.clear()), "a group of 0 problems"),
        (_changed(lambda rows: rows[1].update(problem_id="q")), "a group of 2 problems"),
        (
            _changed(lambda rows: [row.update(problem_id="q") for row in rows]),
            "a group of problem 'q'; 'p' was asked for",
        ),
        (_changed(lambda rows: rows[1].update(prompt_ids=[9])), "responses to other tokens than those of the prompt"),
        (_changed(lambda rows: rows[0].update(segments=[])), "a response of 0 tokens"),
        (_changed(lambda rows: rows[0]["segments"].reverse()), "segments that are not in order"),
        (_changed(lambda rows: rows[1].update(finish=None)), "a response that is not complete"),
        (
            _candidate(**{name: [1, 2, 3] for name in COLUMNS}),
            "a candidate of 3 tokens; between 1 and 2 were asked for",
        ),
        (_candidate(**{name: [] for name in COLUMNS}), "a candidate of 0 tokens"),
        (_candidate(ids=(1, VOCABULARY)), "outside the vocabulary"),
        (_candidate(ids=(-1, 1)), "outside the vocabulary"),
        (_candidate(entropies=(0.1, math.nan)), "entropies that are no entropies"),
        (_candidate(entropies=(0.1, math.inf)), "entropies that are no entropies"),
        (_candidate(entropies=(0.1, -0.1)), "entropies that are no entropies"),
        (_candidate(logprobs=(0.1, -math.inf)), "logprobs that are not finite"),
        (_candidate(uncertainty=math.nan), "judgements that are no numbers"),
        (_candidate(threshold=math.nan), "judgements that are no numbers"),
        (_erased(start=2_000_000_000), "an erasure of 2 tokens behind 2000000000"),
        (_erased(start=-1), "an erasure of 2 tokens behind -1"),
        (_erased(start=5), "behind 5, in segment 0, of 6 tokens"),
        (_erased(index=2_000_000_000), "in segment 2000000000"),
        (_erased(index=-1), "in segment -1"),
        (_shorter(start=3), "an erasure behind 3 tokens, which are not there"),
        (_changed(lambda rows: rows[0].update(erasures=rows[0]["erasures"] * 9)), "9 erasures of a segment; "),
    ],
)
def test_what_can_not_be_an_answer_is_refused(batch: pa.RecordBatch, message: str):
    with pytest.raises(ValueError, match=message):
        group_of(batch, prompt("p"), SETTINGS, VOCABULARY)


def test_measures_are_as_many_as_tokens_or_the_group_does_not_arrive():
    with pytest.raises(ValueError, match="candidates with other numbers of ranks than tokens"):
        from_ipc(to_ipc([_candidate(ranks=(1,))]))


def test_a_response_is_as_long_as_was_asked_for_at_most():
    short = replace(SETTINGS, rollout=rollout(max_completion_length=5))
    with pytest.raises(ValueError, match="a response of 6 tokens; between 1 and 5 were asked for"):
        group_of(encode([GROUP]), prompt("p"), short, VOCABULARY)


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        (HELLO, None),
        (replace(HELLO, protocol=1), "protocol 1"),
        (replace(HELLO, e3rl="0.0.1"), "it runs e3rl 0.0.1"),
        (replace(HELLO, architecture="xyz"), "another architecture"),
        (replace(HELLO, max_length=19), "its rows hold 19 tokens and the run needs 20"),
        (replace(HELLO, rows=3), "it holds 3 rows and a group needs 4"),
    ],
)
def test_a_worker_that_does_not_fit_is_refused(hello: Hello, message: str | None):
    found = check_hello(hello, "abc", longest=20, siblings=4)
    assert found is None if message is None else message in str(found)
