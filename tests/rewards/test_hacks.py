"""Answers that are wrong and were once taken for right, by what made them pass; and answers that once stopped a run."""

from __future__ import annotations

import time

import pytest

from e3rl.rewards.answers import extract_answer, last_box, vote
from e3rl.rewards.grading import grade_all
from e3rl.rewards.math_check import check
from e3rl.rewards.pool import ProcessPool

REFUSED = {
    "a letter of the reference": [
        ("12 J", "J"), ("E = mc^2", "E"), (r"A \cup B", "B"), (r"37^\circ C", "C"), ("Ax + B", "B"), ("D_4", "D"), ("2A", "A"),
        ("F(x)", "F"), ("AB", "B"), (r"\text{point } C", "C"), ("Angle A", "A"), ("(A, B)", "B"),
    ],
    "nearly the number": [
        ("2^{100}-1", "2^{100}"), ("20!", "20!+1"), ("18446744073709551615", "2^{64}"), ("1/1000!", "1/1001!"),
        ("0", "e^{-1000}"), ("1", "1+e^{-1000}"), ("10^{40}", "10^{40}+1"), (r"\frac{1}{10^{30}}", r"\frac{1}{10^{31}}"),
        ("0", "10^{-9999}"), (r"\sqrt{2}", r"\sqrt{2}+10^{-60}"), ("x", "x+10^{-50}"), ("3^{200}", "3^{200}+x-x+1"),
        ("18446744073709551615", "1.84467440737095e19"), ("123456789012", "123456789012.3"),
    ],
    "a choice from a list": [
        ("D", "The answer is A, B, C, D"), ("A", "The answer is A, B, C, D"), ("D", "C. No wait, D"), ("C", "C. No wait, D"),
        ("(B) 57", "B. 58"), ("(B) 57", "The answer is B. 58."), ("(B) 57", "The answer is $B. 58$."),
        ("B", "A B C D"), ("D", "A, B, C, D"), ("A", r"\boxed{A, B}"), ("B", r"\boxed{(A)(B)}"),
        ("A", r"\boxed{(A)(B)}"), ("A", r"\boxed{A \text{ or } B}"), ("C", "It is either B or C"), ("C", "The answer is not C"),
        ("A", "(A) or (B)"), ("D", "Not D."), ("B", "The answer is A/B"),
    ],
    "something that is not understood between two equals signs": [
        ("x=3", "x=3\n°x\\forall=3"), ("3", r"\boxed{x = 58° = 3}"), ("3", r"x = \text{58 or perhaps, not sure} = 3"),
        ("3", r"\boxed{x = \forall58 = 3}"),
    ],
    "words that change a number": [
        ("57", f"{wrapped}") for words in (
            "57 squared", "57 cubed", "57 factorial", "57 tenths", "57 ppm", "57 divided by seven", "57 (wrong)", "57/58/58",
            "58 = 57", "57 light years", "57 hundredths", "not 57", "57 halves", "57 thousand", "57 times two", "57 pairs",
            "57 minus one", "57!", "57 plus 1", "57 or 58", "57 mod 5", "57 wrong",
        ) for wrapped in (rf"\boxed{{{words}}}", rf"\boxed{{\text{{{words}}}}}", f"The answer is {words}.", f"So it is {words}.")
    ] + [
        ("57", "The answer is not 57"), ("35", "5**7"), ("57", r"\boxed{57 \text{ squared}}"), ("57", "It is 55, 56, 57."),
        ("57", "It isn't 57."), ("57", "50 + 57 is a sum"), ("57", r"\boxed{57^2}"), ("57", "The answer is 57 squared, because."),
        ("57", "Perhaps 57."), ("57", r"\boxed{57, 58}"), ("57", r"\boxed{57}, \boxed{58}"), ("2", "The answer is 1 + 2"),
        ("57", r"\boxed{57}\boxed{58}"), ("57", r"The answer is $57$ squared."), ("57", r"So it is $57$ cubed."),
    ],
    "beside another answer": [
        ("540", r"The answer is $540$. $34\text{ sq. units}$."), ("3 + 4i", r"The answer is $3 + 4i$. $34\text{ sq. units}$."),
        (r"34\text{ sq. units}", r"The answer is $34\text{ sq. units}$. $540$."),
    ],
    "words before a number": [
        ("57", f"{words} {number}{end}") for words in (
            "The answer is minus", "The answer is negative", "The answer is twice", "The answer is the square of", "#### minus",
            "The answer is half of", "The answer is at least", "The answer is anything but", "The answer is nearly",
            "The answer is rarely", "So x equals minus", "Hence the result is the opposite of", "It is more than",
        ) for number, end in (("57", "."), ("$57$", ""), (r"\(57\)", "."))
    ] + [
        ("57", f"{begin}57 {words}") for begin in ("The answer is ", "So it is ") for words in (
            "more than 3", "in base 8.", "and a half.", "doubled", "less than 100", "below zero.",
        )
    ],
    "units": [
        ("5 cm", "5 light years"), (r"90^\circ", "90 radians"), ("3 AM", "3 PM"), ("5 apples", "5 oranges"), ("5 mW", "5 MW"),
        ("5 m", "5 m^2"), (r"5\text{ m/s}", r"5\text{ s/m}"), (r"5\text{ m/s}", r"5\text{ m}\cdot\text{s}"), ("5 cm", "5 blorks"),
        ("18 units", r"18\text{ units} cubed"), ("18 units", "18 units squared"), (r"18\text{ units}", r"18\text{ units}^2"),
        ("18 square units", "18 units"), ("18 cm", "18 units squared"), ("5", "5 blorks"),
        ("5 kilograms", "5 pounds"), (r"\$5", "5 cents"), ("5 people", "5 years"), ("5 hours", r"5^\circ"),
    ],
    "what the data sets found": [
        ("12.0625", "12.06245"), (r"\frac{NO}{BO}=2", "NO"),
        ("3s^2", "3"), ("3 s^2", "3"), (r"12\text{ square units}", r"12\text{ square units} cubed"), ("x-3z=0", "x-3z=0 ppm"),
        (r"\text{A,D}", "D"), (r"\text{A,D}", r"\text{a,D}"), ("1,2,3", r"1,2,3,\text{circle}"), ("k=6", r"83^\circ = k=6"),
        ("8.24", r"\text{not } \approx 8.24"), (r"\frac23", r"\frac23 \approx 0.67, -2x-1"), (r"\frac23", r"\frac23 \approx 7"),
        (r"\frac23", r"\frac23 \approx 0.697"), (r"\$\frac23 \approx \$0.67", r"\$\frac23 \approx \$0.697"),
        (r"\$16,\!386.16", r"\$16,\!386.1"),
        ("-3,0", "-3"), ("0", "0y"), ("0", "0 ppm"), ("I(0)", "0"), ("I(0)", "2I(0)"), ("k>2", "K>2"), ("x>5", "y>5"),
        (r"\frac{dx}{dt}=kx", r"\frac{Dx}{Dt}=kx"), ("y=2x+3", "15=y=2x+3"),
    ],
    "pairing": [
        ("a=1, b=2", "2,1"), ("a=1, b=2", "b=1, a=2"), ("(1,2)", "(2,1)"), ("1,1,2", "1,2,2"), ("1,1,2", "1,2"), ("1,2", "1,2,2"),
        (r"\{1,1,2\}", r"\{1,2,2\}"), ("[1,2]", "1,2"), ("[1,2)", "1,2"), ("[1,2]", "(1,2)"), (r"(1,\infty)", r"1,\infty"),
        ("x=1", "y=1"), ("1:2", "2:1"), ("x=1, y=2, z=3", "1,3,2"), ("[3,3]", "3"),
    ],
    "the case of a symbol": [
        (r"2\pi r", r"2\pi R"), ("ab", "aB"), ("x and y", "X and Y"), (r"\theta", r"\Theta"), ("2n", "2N"), ("P", "p"),
    ],
    "what is no equation": [
        ("7", "x+y=7"), ("57", "58=57"), ("57", "0=57-57"), ("x+y=5", "5"), ("5", "2+2=5"), ("4", "5=2+2=4"),
        ("x=3", r"x=\to3x^=3"), ("3", "x=+=3"), ("3", r"\boxed{x = foo^ = 3}"),
    ],
    "half a number": [("x=3", r"so \boxed 3.5 1 ^ +"), ("3", r"\boxed 3,5"), ("3", r"\boxed 3.5")],
    "not the whole": [
        (r"\frac{1}{2}", "1"), (r"3\sqrt{2}", "3"), ("x^2+1", "x^2"), ("1.5", "1"), ("1,234", "1"), ("(1,2)", "1"), ("2x", "2"),
        (r"\frac{3}{4}", "34"), ("-5", "5"), ("5", "-5"), ("12", "1 2"), ("x<3", "3"), ("x=3 or x=4", "3"), ("3+4i", "3"),
    ],
}  # fmt: skip

STATED = ("The answer is {}", "Final answer: {}", "The answer is ${}$", "**Answer:** {}", "#### {}")
TURNS = [
    ". No wait, {}", ". Wait, {}.", ". Actually, {}.", ". Or {}.", ". No, {}.", ". Hmm, actually {}.", ". Sorry, {}.",
    ". Correction: {}.",
    ". On second thought, {}.", ". I mean {}.", ". Scratch that, {}.", ". But it could be {}.", ". Alternatively, {}.",
    ". Maybe {}.",
    ". That's wrong. It is {}.", ". It might also be {}.", ". However, it is {}.", ". Never mind, it is {}.", ". {}.",
    ". Also {}.",
    ". {} is possible too.", ". Otherwise {}.", ". Or is it {}?", "?", " (?)", ", I guess.", ", or {}.", "; {}.", "; no, {}.",
    "... {}.",
    " - no, {}", ", wait no {}.", " then {}.", " probably, or {}.", ".\n\nWait, {}.", "\nNo, {}.", "! No, {}!",
]  # fmt: skip
GOES_ON = [
    "This is because 58 is even.", "No other values work.", "Check: 50 + 7 = 57.", "Note that the other is 58.",
    "Or equivalently 114/2.",
    "It is not divisible by 2.", "Otherwise the sum would be 60.", "However, this was not needed.", "Not all of them are prime.",
    "Let me check: 50 + 7 = 57.", "\n\nQuestion: What is 5 + 8?", "\n\n1. First, 50.\n2. Then 7.", "(See the figure.)",
    "Also, note the other.",
]  # fmt: skip
PAIRS = [("C", "D"), ("57", "58"), (r"\frac{1}{2}", r"\frac{1}{3}"), ("x+1", "x+2")]
FORMULAS = [
    "q^2 - p^2",
    r"-1, \; -5",
    "1 - x",
    "3 - i, -2 + i",
    r"34\text{ sq. units}",
    r"\begin{pmatrix} 1 & -2 \\ 3 & 4 \end{pmatrix}",
    "5!",
]

ACCEPTED = [
    ("A", "The answer is A."),
    ("12 J", "12 J"), ("12 J", "12"), ("12 J", "12 joules"), ("E = mc^2", "E=mc^2"), (r"A \cup B", r"A\cup B"), ("B", "B."),
    ("Ax + B", "B + Ax"), ("2^{100}-1", "1267650600228229401496703205375"), ("20!", "2432902008176640000"),
    ("D", "A is too small and B and C are too large, so the answer is D."), ("(B) 57", "B. 57"), ("(B) 57", "57"),
    ("(B) 57", "The answer is B. 57."), ("(B) 57", "The answer is B. The others are too small."),
    ("57", "57.0"), ("57", "The answer is 57, because 58 is even."), ("57", "57 apples"), ("57", r"\boxed{57\text{ apples}}"),
    ("5 cm", "5 centimetres"), (r"90^\circ", "90 degrees"), ("3 PM", "3 p.m."), ("a=1, b=2", "1,2"), ("a=1, b=2", "b=2, a=1"),
    ("1,2", "2,1"), ("x=1, x=2", "2, 1"), ("[1,2]", r"1 \le x \le 2"), ("(1,2)", "1, 2"), (r"2\pi r", r"\pi \cdot 2r"),
    ("35", "5*7"), ("78125", "5**7"), ("57", "57 = 58 - 1"), (r"\frac{1}{3}", "0.333333"), (r"\pi", "3.14159265"),
    ("0", "e^{-1000}-e^{-1000}"), ("1/1000!", r"\frac{1}{1000!}"), ("10^{9999}", "10^{9999}"), ("C", "**C**"), ("5", "five"),
    ("B, C", "C, B"), ("B, C", "B and C"), ("(n-2) 2^n", "2^n (n-2)"), ("I(0)", "I(0)"), (r"\frac{dx}{dt}", r"\frac{dx}{dt}"),
    (r"\frac23", r"\frac23 \approx 0.67"), ("64 m^3", "64"),
    ("-57", "The answer is minus 57."), ("-57", "The answer is negative $57$."), ("57", "The answer is a total of 57."),
    ("57", "The sum of the roots is $57$."), ("57", "The value of the square root is 57."), ("57", "He needs 57 more."),
    ("57", "The answer is after 57 minutes."), ("57", "The answer is approximately 57."),
    ("$f(x)=a x+b$, where $a>0$", r"\boxed{$f(x)=a x+b$, where $a>0$}"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "response"), [pair for pairs in REFUSED.values() for pair in pairs])
def test_wrong_answers_are_wrong(gold: str, response: str) -> None:
    assert check(gold, response)[0] is False


@pytest.mark.parametrize(("gold", "response"), ACCEPTED)
def test_right_answers_are_still_right(gold: str, response: str) -> None:
    assert check(gold, response)[0] is True


@pytest.mark.parametrize("turn", TURNS)
def test_an_answer_that_is_taken_back_or_doubled_is_wrong(turn: str) -> None:
    accepted = [
        said
        for gold, other in PAIRS
        for stated in STATED
        if check(
            gold, said := stated.format(gold) + turn.format(f"${other}$" if "$" in stated or "\\" in other else other)
        )[0]
    ]
    assert accepted == []


@pytest.mark.parametrize("formula", FORMULAS)
def test_what_ends_a_sentence_does_not_end_a_formula(formula: str) -> None:
    assert check(formula, f"The final answer is ${formula}$.")[0]
    assert check(formula, rf"**Answer:** \({formula}\)")[0]
    for after in (", I guess.", ". $960$.", rf". $\begin{{pmatrix}} {'0 & ' * 60} 0 \end{{pmatrix}}$."):
        assert not check(formula, f"The answer is ${formula}$" + after)[0], after


@pytest.mark.parametrize("more", GOES_ON)
def test_a_response_may_go_on_after_its_answer(more: str) -> None:
    assert [said for gold, _ in PAIRS for s in STATED if not check(gold, said := f"{s.format(gold)}. {more}")[0]] == []


# --- no answer hurts a run

HURTFUL = [
    r"\boxed{1}" + " " * 4000 + r"!\boxed{2}", r"\boxed{" + "/".join("1" * 400) + "}", r"\boxed{10^{9999}}",
    r"\boxed{" + "1/" * 900 + "1}", r"\boxed{10^{-9999}}", "the answer is " + "1/" * 5000,
    r"\boxed{" + "{" * 900 + "}" * 900 + "}", r"\boxed{" + "-" * 1900 + "1}", r"\boxed{" + r"\sqrt" * 300 + "2}",
    r"\boxed{" + "2^" * 900 + "2}", "\ud800 57", "\x00" * 100, r"\boxed{" + "9" * 1900 + "}",
    r"\boxed{" + "9" * 900 + "^" + "9" * 900 + "}", r"\boxed{1e9999}", r"\boxed{" + "!" * 1900 + "}", r"\boxed{\frac{1}{0}}",
    r"\boxed{0/0}", r"\boxed{0^0}", r"\boxed{\ln 0}", r"\boxed{\tan 90^\circ}", r"\boxed{10^{10^{10^{10}}}}",
    r"\boxed{\binom{10^{9}}{10^{8}}}", r"\boxed{\Gamma(5)}", r"\boxed{(-1)!}", r"\boxed{\sqrt[0]{2}}", r"\boxed{\log_1 2}",
]  # fmt: skip


@pytest.mark.parametrize("response", HURTFUL, ids=lambda r: ascii(r[:24]))
def test_no_answer_raises_or_takes_long(response: str) -> None:
    began = time.process_time()
    assert check("57", response)[0] is False
    assert check(r"\sqrt{2}x", response)[0] is False
    answer = extract_answer(response)
    last_box(response)
    assert isinstance(vote((answer or "")[:2000]), str)
    assert time.process_time() - began < 1


def test_a_hurtful_answer_costs_one_reward_at_most() -> None:
    pool = ProcessPool(1, 5.0)
    try:
        grades = grade_all([("57", response) for response in [*HURTFUL, r"\boxed{57}"]], pool)
    finally:
        pool.close()
    assert [g.correct for g in grades] == [False] * len(HURTFUL) + [True]
    assert pool.restarts == 0
