"""What a diagnosis looks at, by value: first samples, and retries from their prefixes, of a scripted engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from e3rl.config import Config
from e3rl.diagnose.diagnosis import observations_of
from e3rl.diagnose.sampling import First, Fork, choose_forks, firsts, retry, roll_out
from e3rl.testing.scripted import Scripted, ScriptedEngine, scripted_candidate
from e3rl.types import Draw, Problem, Prompt, Reward, Trajectory
from tests.rollout.worlds import levels, rollout

RIGHT = "47+5=52;52-8=44;A:44"
LATE = "47+5=52;52-8=44;A:43"  # wrong in its last segment
MIDDLE = "47+5=52;52-8=43;A:43"
EARLY = "47+5=53;53-8=45;A:45"
CONFIG = Config(rollout=rollout())
PROMPTS = [
    Prompt(Problem(name, "47+5-8:", "44", {"family": "chain", "question": "47+5-8:"}), (1, 2, 3)) for name in "pq"
]
LEVELS = {
    ("p", 0, 0, 0): (0.2, 0.4),
    ("p", 0, 1, 0): (1.0, 2.0),
    ("p", 1, 2, 0): (0.1, 0.9),
    ("p/0/1", 0, 0, 0): (0.4, 0.8),
    ("p/0/1", 0, 1, 0): (9.0, 9.0),
}


@dataclass
class Texts:
    """A tokenizer to which every token is four characters: of `RIGHT`, unless one of them was given another text."""

    texts: dict[int, str] = field(default_factory=dict)

    def give(self, text: str, prompt: str, sibling: int, segment: int = 0) -> None:
        draw = Draw(0, 0, prompt, sibling, segment, 0)
        self.texts[scripted_candidate(draw, Scripted((0.5, 0.5)), 2).ids.tolist()[0]] = text

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text = next((self.texts[i] for i in ids if i in self.texts), RIGHT)
        return text[: 4 * len(ids)]


class Grader:
    """Right is `RIGHT`; what begins with a question mark can't be graded."""

    def score(self, trajectories: Sequence[Trajectory], texts: Sequence[str]) -> list[Reward]:
        values = [None if text.startswith("?") else float(text == RIGHT) for text in texts]
        return [Reward(value, {"math": value}, error="no" if value is None else None) for value in values]


def sampled(texts: Texts, by_steps: bool = True) -> tuple[list[First], list[str | None], ScriptedEngine]:
    engine = ScriptedEngine(levels(LEVELS))
    found, faults = firsts(roll_out(engine, PROMPTS, CONFIG), Grader(), texts, by_steps)  # type: ignore[arg-type]
    return found, faults, engine


def peak(largest: float) -> float:
    """Eq 13 against the entropies of p's siblings: 0.2, 0.4, 1.0, 2.0, 0.1, 0.9 and six times 0.5."""
    entropies = [0.2, 0.4, 1.0, 2.0, 0.1, 0.9, *[0.5] * 6]
    mean = sum(entropies) / 12
    std = math.sqrt(sum((h - mean) ** 2 for h in entropies) / 12)
    return 1 / (1 + math.exp(-(largest - mean) / (std + 1e-6)))


def test_groups_come_in_the_order_of_the_prompts():
    slow = ScriptedEngine(levels({}), ticks=lambda draw, tokens: 9 if draw.prompt_id == "p" else 1)
    groups = roll_out(slow, PROMPTS, CONFIG)
    assert [g.prompt.problem.id for g in groups] == ["p", "q"]
    assert [s.judgement for t in groups[0].trajectories for s in t.segments] == [None] * 6


def test_first_samples_are_measured_and_labelled_segment_by_segment():
    texts = Texts()
    texts.give(MIDDLE, "p", 0, segment=1)
    texts.give("?", "q", 1)
    found, faults, _ = sampled(texts)
    assert faults == [None, None, None, "no"]
    assert [(f.trajectory.prompt.problem.id, f.trajectory.sibling) for f in found] == [("p", 0), ("p", 1), ("q", 0)]
    first = found[0]
    assert (first.right, first.wrong_N) == (False, (False, True))
    assert (found[1].right, found[1].wrong_N) == (True, (False, False, False))
    assert [s["entropy"] for s in first.signals_N] == pytest.approx([0.3, (1.5 + 0.15) / 1.5, (0.5 + 0.75) / 1.5])
    assert [s["entropy peak"] for s in first.signals_N] == pytest.approx([peak(0.4), peak(2.0), peak(0.5)])
    assert [s.get("entropy after") for s in first.signals_N] == [1.5, 0.5, None]


def test_retries_are_measured_as_the_first_was_and_go_to_the_end_of_the_response():
    texts = Texts()
    for sibling, text in enumerate([LATE, MIDDLE, EARLY]):  # and a fourth, which is right
        texts.give(text, "p/0/1", sibling)
    (first, *_), _, engine = sampled(texts)
    before = len(engine.calls)
    [fork], seen = retry(engine, Grader(), texts, CONFIG, [(first, 1)], 4, by_steps=True)  # type: ignore[arg-type]
    calls = engine.calls[before:]
    assert {c.tokens for c in calls if c.kind == "prefill"} == {5}  # the prompt and the first segment
    assert sum(c.tokens for c in calls if c.kind == "deliver") == 4 * 4
    size, rest = len(first.trajectory.segments[1].candidate.ids), sum(first.trajectory.segment_lengths[1:])
    assert fork == Fork(
        "p", first.signals_N[1], True, 0.25, extra_tokens=size + 4 - rest
    )  # retries of four tokens each
    assert {o.prefix for o in seen} == {"p/0/1"}
    assert {o.problem for o in seen} == {"p"}
    assert [o.wrong for o in seen] == [False, False, True, False]  # the one that erred in the prefix says nothing
    assert seen[0].signals == first.signals_N[1]
    again = seen[1].signals
    assert again["entropy"] == pytest.approx((0.6 + 0.15) / 1.5)
    assert again["entropy peak"] == pytest.approx(peak(0.8))
    assert again["entropy after"] == 9.0


def test_forks_are_at_segments_that_can_be_judged():
    texts = Texts()
    texts.give(EARLY, "p", 0)
    found, _, _ = sampled(texts)
    chosen = [choose_forks(found, seed) for seed in range(20)]
    assert {n for forks in chosen for first, n in forks if first is found[0]} == {0}
    assert {n for forks in chosen for first, n in forks if first is found[1]} == {0, 1, 2}
    assert chosen[3] == choose_forks(found, 3)


def test_siblings_share_the_empty_prefix_and_nothing_after_it():
    texts = Texts()
    texts.give(MIDDLE, "p", 0, segment=1)
    found, _, _ = sampled(texts)
    every, starts = observations_of(found)
    assert [o.wrong for o in every[:5]] == [False, True, False, False, False]
    assert len(every) == 2 + 3 * 3
    assert [(o.problem, o.prefix) for o in starts] == [("p", "p"), ("p", "p"), ("q", "q"), ("q", "q")]
    assert [o.signals["entropy"] for o in starts[:2]] == pytest.approx([0.3, 0.5])


def test_a_sibling_draws_its_own_retries():
    texts = Texts()
    found, _, engine = sampled(texts, by_steps=False)
    before = len(engine.calls)
    retry(engine, Grader(), texts, CONFIG, [(found[0], 0), (found[1], 0)], 1, by_steps=False)  # type: ignore[arg-type]
    draws = [c.draw for c in engine.calls[before:] if c.kind == "extend" and c.draw is not None]
    assert {d.prompt_id for d in draws} == {"p/0/0", "p/1/0"}
