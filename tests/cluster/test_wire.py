"""Messages survive the way, bit by bit, and nothing else is taken for one."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.cluster.messages import Answer, Ask, Fault, Task, decode_answer, encode_answer
from e3rl.cluster.wire import decode, encode
from e3rl.config import Config, ErasureConfig, RolloutConfig
from e3rl.rollout.columns import encode as encode_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.moments import Distribution, Moments
from e3rl.rollout.statistics import CalibrationStatistics
from e3rl.rollout.value import PRIOR
from e3rl.types import Draw
from tests.rollout.worlds import levels, roll

FAULT = Fault("NonFiniteLogits", "two\nlines", Draw(1, 2, "p\ud800", 0, 0, 1))
ANSWER = Answer("r", 12, FAULT)
GROUPS = [encode_groups([group]) for group in roll(levels({("p", 0, 0, 0): 2.0}))[0].values()]
REFERENCE = CalibrationStatistics(
    {"erasure.metric": "e3rl"}, (Distribution(Moments(3, 0.5, 0.1), (0.25, 0.75)),), Moments(2, math.pi, 0.0)
)


def test_an_answer_comes_back_as_it_was():
    assert decode_answer(encode_answer(ANSWER, GROUPS)) == (ANSWER, GROUPS)
    assert decode_answer(encode_answer(ANSWER, [])) == (ANSWER, [])


def test_what_can_not_travel_is_refused_by_its_sender():
    settings = GroupSettings(RolloutConfig(), ErasureConfig(), 0, 1, 2, hooks=(lambda *_: None,))
    with pytest.raises(ValueError, match="hooks can't be sent"):
        encode(Ask("r", settings, (), 0.5))


@pytest.mark.parametrize("reference", [REFERENCE, replace(REFERENCE, head=PRIOR)])
def test_an_assignment_with_statistics_comes_back_as_it_was(reference: CalibrationStatistics):
    ask = Ask(
        "r",
        GroupSettings(RolloutConfig(), ErasureConfig(), 0, 1, 2, reference, Moments(1, 2.0, 3.0)),
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
        decode_answer(body)
    with pytest.raises(ValueError):
        decode_answer(encode(ANSWER) + b"\n" + (body or b" "))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("beat",), "12"),
        (("beat",), True),
        (("fault", "draw", "attempt"), 1.5),
        (("fault", "draw"), {"seed": 1}),
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
