"""The built-in rewards: literal values, the answer checker against a table, and inputs made to hang it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from e3rl.config import DataConfig, RewardsConfig
from e3rl.data.loading import load_problems
from e3rl.errors import UserError
from e3rl.rewards.builtin import make_overlong_reward, overlong_penalty
from e3rl.rewards.scorer import Scorer
from e3rl.types import Prompt, Reward, Trajectory
from tests.rewards.build import trajectory

SAME = [
    ("1/2", r"\frac{1}{2}"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac12", r"\dfrac{1}{2}"),
    (r"-\frac{3}{4}", r"\frac{-3}{4}"),
    (r"\frac{2}{4}", r"\frac{1}{2}"),
    (r"3\frac{1}{2}", "3.5"),
    ("0.001", "10^{-3}"),
    (r"1.5\times10^3", "1500"),
    (r"\frac{1}{3}", "0.333333333333"),
    (r"50\%", "50%"),
    (r"50\%", "0.5"),
    (r"50\%", "50"),
    ("1,000", "1000"),
    ("1000", "1{,}000"),
    ("033", "33"),
    ("27", "27.0"),
    ("5", "5."),
    ("-5", "−5"),
    ("12", r"12\text{ cm}"),
    (r"12\text{ cm}", "12"),
    (r"12\text{ cm}", r"12\mathrm{~cm}"),
    (r"6\text{ m/s}", "6"),
    ("5", "5 apples"),
    ("5 apples", "5"),
    (r"\$12", "12"),
    (r"90^\circ", "90"),
    ("90", r"90^{\circ}"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\sqrt{\frac{1}{4}}", r"\frac12"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"2\pi", r"\pi \cdot 2"),
    (r"\frac{\pi}{2}", r"0.5\pi"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\{1,2\}", "2,1"),
    ("1,2", "2, 1"),
    (r"1\pm\sqrt2", r"1+\sqrt2, 1-\sqrt2"),
    ("(1,2)", r"\left(1, 2\right)"),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3,\pi/2)"),
    ("[0,1)", r"\left[0,1\right)"),
    ("[0,1)", r"0 \le x < 1"),
    (r"(-\infty,3)", "x<3"),
    (r"x\ge 2", r"[2,\infty)"),
    (r"x \in [0,1]", "[0,1]"),
    (r"(0,1)\cup(2,3)", r"(2,3)\cup(0,1)"),
    ("x^2+2x+1", "(x+1)^2"),
    ("4x^2-1", "(2x-1)(2x+1)"),
    ("x+y", "y+x"),
    (r"\frac{x}{2}", "0.5x"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("y=2x+1", "y = 1+2x"),
    ("2+3i", "3i+2"),
    (r"\text{(A)}", "A"),
    ("A", "(A)"),
    (r"\text{even}", "even"),
    ("Evelyn", r"\text{Evelyn}"),
    ("Tuesday", "tuesday"),
    (r"\infty", "infinity"),
    ("2^{10}", "1024"),
    ("5!", "120"),
    (r"\binom{5}{2}", "10"),
    (r"\log_2 8", "3"),
    ("e^0", "1"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
]
DIFFERENT = [
    ("1/2", r"\frac{1}{3}"),
    ("0.5", "0.05"),
    ("1.5", "15"),
    ("12", "13"),
    ("12", "1 2"),
    ("1000", "100"),
    ("1{,}000", "1"),
    ("3.14", r"\pi"),
    (r"\sqrt2", "1.414"),
    ("0.333", r"\frac13"),
    (r"3\frac12", r"\frac{3}{2}"),
    (r"50\%", r"5\%"),
    ("10^{-3}", "10^3"),
    ("2^{10}", "2^{11}"),
    ("-5", "5"),
    (r"\pi", r"2\pi"),
    ("(1,2)", "(2,1)"),
    (r"(3,\frac{\pi}{2})", r"(3,\frac{\pi}{3})"),
    ("[0,1)", "[0,1]"),
    ("[0,1)", "(0,1)"),
    ("x<3", "x>3"),
    (r"x\le3", "x<3"),
    (r"\{1,2\}", r"\{1,3\}"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("1,2", "1,2,3"),
    ("x+y", "x-y"),
    ("x^2", "x^3"),
    ("x=5", "6"),
    ("12", "12x"),
    ("2+3i", "2-3i"),
    (r"\infty", r"-\infty"),
    (r"\text{(A)}", r"\text{(B)}"),
    ("A", "B"),
    ("even", "odd"),
    (r"\text{even}", "neve"),
    ("Tuesday", "Thursday"),
    ("yes", "no"),
    ("5", "5 million"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
]
HANGING = [
    "9^{9^{9^9}}",
    "(10^9)!",
    r"\sum_{k=1}^{10^9} 1/k^2",
    r"\binom{10^7}{5000000}",
    "(" * 900 + "1" + ")" * 900,
    "x" * 1900,
]


@pytest.fixture(scope="module")
def maths() -> Iterator[Scorer]:
    with Scorer(RewardsConfig(workers=2, timeout=20.0)) as scorer:
        yield scorer


def check(scorer: Scorer, pairs: list[tuple[str, str]]) -> list[Reward]:
    trajectories = [trajectory("q", gold) for gold, _ in pairs]
    return scorer.score(trajectories, [f"so it is $\\boxed{{{answer}}}$." for _, answer in pairs])


def test_equal_answers(maths: Scorer) -> None:
    assert [p for p, r in zip(SAME, check(maths, SAME), strict=True) if r.value != 1.0] == []


def test_near_misses(maths: Scorer) -> None:
    assert [p for p, r in zip(DIFFERENT, check(maths, DIFFERENT), strict=True) if r.value != 0.0] == []


def test_rewards_of_whole_responses(maths: Scorer) -> None:
    texts = [r"\boxed{4}", "The answer is 4.", "2+2=4", "#### 4", r"\boxed{5} since 4", "I don't know", "", r"\boxed{4"]
    rewards = maths.score([trajectory("2+2?", "4")] * len(texts), texts)
    assert [r.value for r in rewards] == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert dict(rewards[0].parts) == {"math": 1.0}


def test_a_problem_without_an_answer_is_missing(maths: Scorer) -> None:
    (reward,) = maths.score([trajectory("q", None)], [r"\boxed{1}"])
    assert reward.value is None
    assert reward.error == "math: the problem has no answer to compare with (data.answer_column)"


def test_nothing_of_a_response_is_read_in_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a response does to the checker, it happens in a process that can be killed."""
    for name in (
        "answers.extract_answer",
        "answers.boxed_answer",
        "answers.is_prose",
        "notation.clean",
        "notation.tidied",
    ):
        monkeypatch.setattr(f"e3rl.rewards.{name}", lambda *_: pytest.fail("read in the trainer"))
    with Scorer(RewardsConfig()) as scorer:
        rewards = check(scorer, [("12", "13"), (r"\frac12", r"\dfrac12"), ("5", "9" * 5000)])
    assert [r.value for r in rewards] == [0.0, 1.0, 0.0]


def test_what_hangs_an_algebra_system_is_wrong_in_time() -> None:
    fine = [(f"{n}.5", rf"\frac{{{2 * n + 1}}}{{2}}") for n in range(len(HANGING))]
    pairs = [pair for hanging, good in zip(HANGING, fine, strict=True) for pair in (("5", hanging), good)]
    with Scorer(RewardsConfig(workers=2, timeout=1.5)) as scorer:
        began = time.monotonic()
        rewards = check(scorer, pairs)
        assert time.monotonic() - began < 30
        assert [r.value for r in rewards[1::2]] == [1.0] * len(HANGING)
        assert [r.value for r in rewards[0::2]] == [0.0] * len(HANGING)
        assert scorer.worker_restarts == 0


def test_answers_longer_than_any_answer_are_wrong_without_a_look() -> None:
    with Scorer(RewardsConfig()) as scorer:
        (reward,) = check(scorer, [("5", "(" * 3000 + "5" + ")" * 3000)])
    assert reward.value == 0.0


# --- format, overlong, lab


def test_format() -> None:
    texts = [r"so \boxed{4}", r"\boxed{}", r"\boxed{4", "4", r"\boxed{\frac{1}{2}} end"]
    with Scorer(RewardsConfig(functions=("format",))) as scorer:
        rewards = scorer.score([trajectory()] * len(texts), texts)
    assert [r.value for r in rewards] == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert dict(rewards[0].parts) == {"format": 1.0}


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0), (30000, -1.0)]
)
def test_overlong_penalty_with_the_numbers_of_dapo(length: int, penalty: float) -> None:
    assert overlong_penalty(length, limit=20480, buffer=4096) == penalty


def test_overlong_rewards() -> None:
    trajectories = [trajectory(tokens=n) for n in (8, 9, 10)]
    with Scorer(RewardsConfig(functions=("overlong",)), max_completion_length=10) as scorer:
        assert [r.value for r in scorer.score(trajectories, [""] * 3)] == [0.0, -0.5, -1.0]
    with Scorer(RewardsConfig(), functions=[make_overlong_reward(4)], max_completion_length=10) as scorer:
        rewards = scorer.score(trajectories, [""] * 3)
    assert [r.value for r in rewards] == [-0.5, -0.75, -1.0]
    assert list(rewards[0].parts) == ["overlong"]
    with pytest.raises(UserError, match="at least 1 token"):
        make_overlong_reward(0)


def test_overlong_without_a_limit_is_an_error_not_a_zero() -> None:
    with Scorer(RewardsConfig(functions=("overlong",))) as scorer:
        (reward,) = scorer.score([trajectory()], [""])
    assert reward.value is None
    assert "it needs max_completion_length" in (reward.error or "")


def test_lab() -> None:
    problems = load_problems("lab:chain:2", config=DataConfig(train_limit=2), split="train")
    trajectories = [Trajectory(Prompt(p, (1,)), 0, (), (), "stop") for p in problems]
    with Scorer(RewardsConfig(functions=("lab",))) as scorer:
        right = scorer.score(trajectories, [str(p.columns["solution"]) for p in problems])
        wrong = scorer.score(trajectories, ["A:x", ""])
    assert [r.value for r in right] == [1.0, 1.0]
    assert [r.value for r in wrong] == [0.0, 0.0]
