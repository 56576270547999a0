"""Messages survive the way, bit by bit, and nothing else is taken for one."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.cluster.messages import Answer, Ask, Fault, Finished, Response, Task
from e3rl.cluster.wire import decode, encode
from e3rl.config import Config, ErasureConfig, RolloutConfig
from e3rl.rollout.distribution import Distribution
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.moments import Moments
from e3rl.rollout.statistics import ReferenceStatistics
from e3rl.types import Candidate, Draw, Erasure, Judgement, Segment, Threshold, Uncertainty, Verdict

CANDIDATE = Candidate((3, 4), (-0.1, -1e-300), (0.1 + 0.2, 1.5), (0.0, 2.0), (1.0, 0.9), (1, 7), False)
JUDGEMENT = Judgement(Uncertainty(1.5, 1.0, 0.3, 0.2, 0.0, 0.9), Threshold(1.2, 1.0, 1.1, 1.09), 0, Verdict.ERASE)
RESPONSE = Response(0, (Segment(0, CANDIDATE, None),), (Erasure(0, 0, CANDIDATE, JUDGEMENT),), "length")
ANSWER = Answer(
    "r", (Finished("p", 3, (RESPONSE,)),), 12, Fault("NonFiniteLogits", "NaN", Draw(1, 2, "p\ud800", 0, 0, 1))
)
REFERENCE = ReferenceStatistics(
    {"erasure.metric": "e3rl"}, (Distribution(Moments(3, 0.5, 0.1), (0.25, 0.75)),), Moments(2, math.pi, 0.0)
)


def test_an_answer_comes_back_as_it_was():
    assert decode(Answer, encode(ANSWER)) == ANSWER


def test_an_assignment_with_statistics_comes_back_as_it_was():
    ask = Ask(
        "r",
        GroupSettings(RolloutConfig(), ErasureConfig(), 0, 1, 2, REFERENCE, Moments(1, 2.0, 3.0)),
        (Task("p", (1, 2)),),
        0.5,
    )
    assert decode(Ask, encode(ask)) == ask


@given(st.floats(allow_nan=False))
def test_numbers_come_back_bit_by_bit(value: float):
    assert decode(Moments, encode(Moments(1, value, 0.0))).mean == value


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>502 Bad Gateway</html>", b"[]", b"{}", b"[" * 100000, b"\xff\xfe", encode(Config())],
    ids=["empty", "a page", "a list", "an empty object", "depth", "no text", "another message"],
)
def test_what_is_no_answer_is_refused(body: bytes):
    with pytest.raises(ValueError):
        decode(Answer, body)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("beat",), "12"),
        (("beat",), True),
        (("finished", 0, "policy_version"), None),
        (("finished", 0, "responses", 0, "finish"), "timeout"),
        (("finished", 0, "responses", 0, "segments", 0, "candidate", "ids"), [1.5]),
        (("finished", 0, "responses", 0, "erasures", 0, "judgement", "verdict"), "maybe"),
        (("fault", "kind"), 3),
    ],
    ids=str,
)
def test_a_field_of_another_type_is_refused_and_named(path: tuple, value: object):
    plain = json.loads(encode(ANSWER))
    at = plain
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ValueError, match=str([p for p in path if isinstance(p, str)][-1])):
        decode(Answer, json.dumps(plain).encode())
