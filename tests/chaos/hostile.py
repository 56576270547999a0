r"""Answers that nobody should have to check: published hangs of math checkers, and fuzz, through the real reward.

    python -m tests.chaos.hostile --inputs 10000

Every answer is scored alone, as the reward function 'math' scores a model's response, under a time limit of a second.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from e3rl.config import RewardsConfig
from e3rl.rewards.pool import GRACE
from e3rl.rewards.scorer import Scorer
from e3rl.types import Candidate, Problem, Prompt, Segment, Trajectory
from tests.chaos.soak import children, resident_mb

TIMEOUT = 1.0

PUBLISHED = (
    r"\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}",
    r"10^{(5^{5^{5^{5^{5}}} \cdot \log_{10}(5)} - 4)}",
    r"2003^{2002^{2001}}",
    r"9^{9^{9^9}}",
    r"(10^9)!",
    r"24! \times 24!",
    r"((((((10!)!)!)!)!)!)",
    r"\sum_{k=1}^{10^9} \frac{1}{k^2}",
    r"\prod_{k=1}^{10^8} (1+\frac{1}{k})",
    r"\binom{10^7}{5000000}",
    r"\log_{2^5}(\log_{2^4}(\log_{2^3}(\log_{2^2}(\log_{2^1}x))))",
    r"{@N 1276915 4951077 \{1,1-3-10);5 _G 2}",
    "(" * 3000 + "1" + ")" * 3000,
    "{" * 3000 + "1" + "}" * 3000,
    r"\frac{" * 800 + "1" + "}{2}" * 800,
    r"\sqrt{" * 1500 + "2" + "}" * 1500,
    "+".join(f"x^{{{i}}}" for i in range(2000)),
    "(x+1)^{100000}",
    r"\int_0^{\infty} e^{-x^{x^{x}}} dx",
    r"\lim_{x\to 0} \sin(x)^{\sin(x)^{\sin(x)^{x}}}",
    "f(x) = x^n",
    "1" + "0" * 100_000,
    "0." + "123456789" * 20_000,
    "9" * 5000 + "^" + "9" * 5000,
    r"\{" + ",".join(str(i) for i in range(20_000)) + r"\}",
    r"\begin{pmatrix}" + r"\\".join("&".join("1" for _ in range(60)) for _ in range(60)) + r"\end{pmatrix}",
    r"(-\infty, 1) \cup " * 300 + r"(2, 3)",
    "x<" * 2000 + "1",
    "1/" * 3000 + "0",
    "-" * 5000 + "1",
    r"\text{" + "a" * 200_000 + "}",
    "٣٫١٤ ½ ⁹⁹⁹ ∞ \u202e\u0000\ud800",
    "__import__('os').system('touch /tmp/e3rl-owned')",
    "().__class__.__bases__[0].__subclasses__()",
    "lambda: exec('while True: pass')",
)
"""What has hung, crashed or filled the memory of math-verify, sympy or a LaTeX parser, by what people have reported, and
of the same kinds."""

_WORDS = (
    *("1", "2", "9", "10", "0", "x", "y", "n", "\\pi", "e", "i", "\\infty", "3.5", "1,000", "50\\%", "7/8"),
    *("+", "-", "*", "/", "^", "_", "!", "=", "<", "\\le", ",", ";", "\\cdot", "\\times", "\\pm", "\\cup", "\\to"),
    *("(", ")", "[", "]", "{", "}", "|", "$", "\\left(", "\\right)", "\\{", "\\}", "&", "\\\\"),
    *("\\frac", "\\sqrt", "\\binom", "\\sum_{k=1}^{n}", "\\int_0^1", "\\lim", "\\log", "\\sin", "\\text", "\\boxed"),
    *(
        "\\begin{pmatrix}",
        "\\end{pmatrix}",
        "\\mathbb{R}",
        "\\forall",
        "°",
        "½",
        "值",
        "\u202e",
        "\x00",
        "\n",
        "'",
        '"',
    ),
)
_SEEDS = ("42", "\\frac{3}{4}", "x^2+2x+1", "(1, 2]", "\\{1,2,3\\}", "2\\sqrt{3}", "0.125", "12\\%", "x=3", "\\pi/6")


def _expression(rng: random.Random, depth: int) -> str:
    """A well-formed expression; now and then one that takes for ever."""
    if depth == 0:
        return rng.choice(("1", "2", "7", "x", "y", "12", "0.5", "\\pi"))
    one, two = _expression(rng, depth - 1), _expression(rng, depth - 1)
    shapes = (
        f"{one}+{two}", f"({one})({two})", f"\\frac{{{one}}}{{{two}}}", f"\\sqrt{{{one}}}", f"({one})^{{{two}}}",
        f"\\log({one})", f"|{one}|", f"({one}, {two})", f"\\{{{one}, {two}\\}}", f"{one} \\le {two}", f"{one}={two}",
    )  # fmt: skip
    return rng.choice((f"({one})!", f"9^{{9^{{{two}}}}}")) if rng.random() < 0.004 else rng.choice(shapes)


def fuzz(count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(gold, answer) pairs: grammar, noise, and mutated ordinary answers in equal parts."""
    rng = random.Random(seed)
    for index in range(count):
        gold = rng.choice(_SEEDS)
        if index % 3 == 0:
            yield gold, _expression(rng, rng.randint(1, 4))
        elif index % 3 == 1:
            yield gold, " ".join(rng.choices(_WORDS, k=rng.randint(1, 25)))
        else:
            letters = list(rng.choice(_SEEDS) * rng.randint(1, 3))
            for _ in range(rng.randint(1, 4)):
                letters.insert(rng.randrange(len(letters) + 1), rng.choice(_WORDS))
            yield gold, "".join(letters)


def trajectory(gold: str, text: str) -> Trajectory:
    """A response of one token with that text; the reward reads the text alone."""
    candidate = Candidate((1,), (-1.0,), (1.0,), (0.0,), (1.0,), (1,), True)
    prompt = Prompt(Problem("p", "?", answer=gold), (1,))
    return Trajectory(prompt, 0, (Segment(0, candidate, None),), (), "stop")


@dataclass
class Verdicts:
    """What came of the inputs."""

    inputs: int = 0
    right: int = 0
    wrong: int = 0
    missing: int = 0
    worst: float = 0.0  # seconds, with no worker to be started
    worst_with_start: float = 0.0
    restarts: int = 0
    grown_mb: float = 0.0
    left_children: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    accepted: list[str] = field(default_factory=list)  # what was right, for people to look at
    wrongly: list[str] = field(default_factory=list)  # anything but right, wrong or missing with a reason


def attack(pairs: Iterator[tuple[str, str]], timeout: float = TIMEOUT) -> Verdicts:
    """Score each pair alone, boxed and bare in turn."""
    found, before = Verdicts(), len(children())
    with Scorer(RewardsConfig(functions=("math",), workers=1, timeout=timeout)) as scorer:
        warm = scorer.score([trajectory("x^2+1", "\\boxed{1+x^2}")], ["\\boxed{1+x^2}"])
        if warm[0].value != 1.0:
            raise RuntimeError(f"the checker can't tell 1+x^2 from x^2+1: {warm[0]}")
        memory, fresh = resident_mb(), False
        for gold, answer in pairs:
            text = f"so it is \\boxed{{{answer}}}" if found.inputs % 2 else f"The answer is {answer}"
            restarts, began = scorer.worker_restarts, time.perf_counter()
            [reward] = scorer.score([trajectory(gold, text)], [text])
            seconds = time.perf_counter() - began
            found.inputs += 1
            found.worst_with_start = max(found.worst_with_start, seconds)
            if not fresh:
                found.worst = max(found.worst, seconds)
            fresh = scorer.worker_restarts > restarts
            if reward.value is None and reward.error:
                found.missing += 1
                found.reasons[reward.error.partition(":")[2].strip()[:60]] += 1
            elif reward.value in (0.0, 1.0) and reward.error is None:
                found.right += reward.value == 1.0
                found.wrong += reward.value == 0.0
                found.accepted += [f"{gold!r} from {answer[:80]!r}"] * (reward.value == 1.0)
            else:
                found.wrongly.append(f"{answer[:80]!r}: {reward}")
        again = scorer.score([trajectory("x^2+1", "")], ["\\boxed{1+x^2}"])
        found.wrongly += [f"afterwards the checker says {again[0]}"] * (again[0].value != 1.0)
        found.restarts, found.grown_mb = scorer.worker_restarts, resident_mb() - memory
    found.left_children = len(children()) - before
    return found


def lines(name: str, found: Verdicts) -> list[str]:
    """The figures, for people."""
    return [
        f"{name}: {found.inputs} inputs, {found.right} right, {found.wrong} wrong, {found.missing} missing "
        f"(never 0); worst delay {found.worst:.2f} s of {TIMEOUT + GRACE:g} s allowed, {found.worst_with_start:.2f} s "
        f"with the start of a new worker; workers replaced {found.restarts}; memory {found.grown_mb:+.1f} MB; "
        f"processes left {found.left_children}",
        *(f"  right: {pair}" for pair in found.accepted[:10]),
        *(f"  missing because: {reason} ({n})" for reason, n in found.reasons.most_common(5)),
        *found.wrongly,
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    published = attack(iter([("3", answer) for answer in PUBLISHED] + [("x^2", answer) for answer in PUBLISHED]))
    print("\n".join(lines("published", published)), flush=True)
    fuzzed = attack(fuzz(options.inputs, options.seed))
    print("\n".join(lines("fuzzed", fuzzed)), flush=True)
    print(json.dumps({"worst": max(published.worst, fuzzed.worst)}))
    raise SystemExit(bool(published.wrongly or fuzzed.wrongly or published.left_children or fuzzed.left_children))


if __name__ == "__main__":
    main()
