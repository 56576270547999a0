"""What counts as the answer of a response without a box, and of one that was cut off."""

from __future__ import annotations

import dataclasses

import pytest

from e3rl.config import RewardsConfig
from e3rl.rewards.answers import Unboxed, extract_answer
from e3rl.rewards.math_check import check
from e3rl.rewards.scorer import Scorer
from tests.rewards.build import trajectory

BOXED, STATED, BARE, LAST = r"so \boxed{7}", "The answer is 7.", "7", "We count them and get 7 in all."


@pytest.mark.parametrize(
    ("unboxed", "expected"),
    [("last", ["7", "7", "7", "7"]), ("stated", ["7", "7", "7", None]), ("none", ["7", None, None, None])],
)
def test_what_counts_without_a_box(unboxed: Unboxed, expected: list[str | None]) -> None:
    assert [extract_answer(text, unboxed) for text in (BOXED, STATED, BARE, LAST)] == expected


@pytest.mark.parametrize(
    ("unboxed", "expected"),
    [("last", [True, True, True, True]), ("stated", [True, True, True, False]), ("none", [True, False, False, False])],
)
def test_choices_and_words_follow_the_setting_too(unboxed: Unboxed, expected: list[bool]) -> None:
    texts = [r"\boxed{B}", "The answer is (B).", "(B)", "After some thought I would go with option B"]
    assert [check("B", text, unboxed)[0] for text in texts] == expected
    words = [r"\boxed{\text{even}}", "The answer is even.", "even"]
    assert [check(r"\text{even}", text, unboxed)[0] for text in words] == expected[:3]


def test_the_setting_reaches_the_reward() -> None:
    texts = [BOXED, STATED, LAST]
    for unboxed, values in (("last", [1.0, 1.0, 1.0]), ("stated", [1.0, 1.0, 0.0]), ("none", [1.0, 0.0, 0.0])):
        with Scorer(RewardsConfig(unboxed=unboxed)) as scorer:  # type: ignore[arg-type]
            assert [r.value for r in scorer.score([trajectory("q", "7")] * 3, texts)] == values


def test_a_response_that_was_cut_off_may_need_a_box() -> None:
    whole = trajectory("q", "7")
    cut = dataclasses.replace(whole, finish="length")
    pairs = [(whole, LAST), (cut, LAST), (cut, STATED), (cut, BOXED), (cut, r"first \boxed{7}, but then \boxed{8")]
    for needs_box, values in ((False, [1.0, 1.0, 1.0, 1.0, 0.0]), (True, [1.0, 0.0, 0.0, 1.0, 0.0])):
        with Scorer(RewardsConfig(cut_off_needs_box=needs_box)) as scorer:
            assert [r.value for r in scorer.score(*map(list, zip(*pairs, strict=True)))] == values  # type: ignore[arg-type]
