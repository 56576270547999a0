r"""Which part of a response is its answer, and what text alone can say about two answers."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.rewards.answers import LONGEST_ANSWER, extract_answer, last_box, normalize, vote


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}.", "2"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\fbox{x} 7", "x"),
        (r"\boxed {7}", "7"),
        (r"$\boxed 5$", "5"),
        (r"\boxed{5 apples}", "5 apples"),
        (r"\boxed{12 pm}", "12 pm"),
        (r"\boxed{5 million}", "5 million"),
        (r"\boxed{12", None),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{}", None),
        ("The answer is 5 apples.", "5 apples"),
        ("The answer is 5. Then 6 more.", "5"),
        (r"The answer is: $\frac{1}{2}$ because 3 > 2", r"$\frac{1}{2}$"),
        (r"the final answer is \(x=2\).", r"\(x=2\)"),
        ("Final Answer: **42**", "42"),
        (r"The answer is **\(5\)**", r"\(5\)"),
        ("Therefore the answer is 2 sqrt(3)", "2 sqrt(3)"),
        ("the answer is 3. No: the answer is 4", "4"),
        ("thinking\n#### 1,234", "1,234"),
        ("47+5=52;52-8=44;A:44", "44"),
        ("I get 3, then -4.5", "-4.5"),
        ("3-4", "3-4"),
        ("so 1/2", "1/2"),
        ("about 50%.", "50%"),
        ("the answer is", None),
        ("nothing here", "nothing here"),
        ("<think>the answer is 5</think> It is 6.", "6"),
        ("<think>the answer is 5", None),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"\boxed{7}. Final answer: 8", "8"),
        (r"\(y_1 = \boxed{5}\) and \(y_2 = \boxed{6}\)", "5, 6"),
        (r"The largest $n$ is $34$.", "$34$"),
        ("", None),
    ],
)
def test_extract_answer(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    "piece", ["{", "}", "\\", "$", "\\(", "\\boxed{", "answer is ", "1,1", " ", "A:", "((", "1 a", "\n"]
)
def test_extraction_is_fast_on_any_repetition(piece: str) -> None:
    began = time.process_time()
    for text in (piece * 30_000, "answer is " + piece * 30_000, "\\boxed{" + piece * 30_000 + "}"):
        answer = extract_answer(text)
        if answer and len(answer) <= LONGEST_ANSWER:
            normalize(answer)
    assert time.process_time() - began < 5


@given(st.text(alphabet="\\boxed{}$1a ", max_size=60))
def test_a_box_is_balanced_and_stands_in_the_text(text: str) -> None:
    inside = last_box(text)
    if inside is not None:
        assert inside in text
        plain = inside.replace("\\\\", "").replace("\\{", "").replace("\\}", "")
        assert plain.count("{") == plain.count("}")


@given(st.text(alphabet="ab1{}\\ ,", min_size=1, max_size=20).filter(lambda t: t.strip() == t))
def test_what_is_boxed_comes_back(inside: str) -> None:
    text = "\\boxed{" + inside.replace("\\", "").replace("{", "").replace("}", "") + "}"
    assert (last_box("see " + text + " there") or "") == text[len("\\boxed{") : -1].strip()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac{1}{2}", r"\dfrac{1}{2}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"x \le 3", r"x \leq 3"),
        (r"50\%", "50%"),
        ("5", "$5$."),
        ("-5", "−5"),
        (r"2\,\pi", r"2 \pi"),
    ],
)
def test_typography_alone_is_normalised(one: str, other: str) -> None:
    assert normalize(one) == normalize(other)


def test_spaces_between_digits_mean_something() -> None:
    assert normalize("12") != normalize("1 2")


def test_votes_for_one_number_are_counted_together() -> None:
    assert {vote(a) for a in ("1,000", "1000", "1000.0", "$1000$", "1000 apples", r"\$1000")} == {"1000"}
    assert vote("0.5") == vote(r"\frac{1}{2}") == "1/2"
    assert vote("x + 1") == "x+1"
    assert len({vote("50%"), vote("50"), vote("0.5")}) == 3
