"""What is sampled, how it is counted and how draws are named, of a scripted engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from e3rl.config import Config, EvalConfig, RolloutConfig
from e3rl.evaluate.evaluation import SEED_OFFSET, evaluation_settings
from e3rl.evaluate.samples import graded
from e3rl.evaluate.study import Plan, Sampler
from e3rl.testing.scripted import ScriptedEngine
from e3rl.types import Reward, Trajectory
from tests.rollout.worlds import ALONE, MEAN_ONLY, levels, prompt, roll, rollout


class Words:
    """A tokenizer that says how many tokens there are."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(len(ids))


class Grader:
    """The first function gives 0.5, which is not right; the second is not looked at."""

    def score(self, trajectories: Sequence[Trajectory], texts: Sequence[str]) -> list[Reward]:
        return [Reward(None, {"first": 0.5, "second": 1.0}) for _ in trajectories]


def test_a_sample_is_charged_for_all_that_was_drawn_for_it():
    """6 tokens are committed, 4 erased, and 2 drawn a second time to be committed after all (D8)."""
    table = {("p", 0, 0, 0): 1.2, ("p", 0, 0, 1): 1.5, ("p", 0, 0, 2): 1.8}
    groups, _ = roll(levels(table), replace(MEAN_ONLY, on_exhausted="least_uncertain"), ALONE)
    grader, words = Grader(), Words()
    [found] = graded(groups["p"], grader, words, mode="erasable", round=1, first=3)  # type: ignore[arg-type]
    assert (found.tokens, found.generated, found.erasures, found.segments) == (6, 12, 2, 3)
    assert (found.correct, found.pred, found.mode, found.round, found.sample) == (False, "6", "erasable", 1, 3)


def test_evaluation_samples_in_its_own_way():
    training = RolloutConfig(num_generations=8, temperature=0.5, top_p=0.9, top_k=7, segment_length=3)
    config = Config(rollout=training, eval=EvalConfig(num_samples=5, temperature=1.3, top_p=0.8, top_k=20))
    found = evaluation_settings(config, erase=False).rollout
    assert found == replace(training, num_generations=5, temperature=1.3, top_p=0.8, top_k=20, erase=False), (
        "and nothing else differs"
    )
    assert evaluation_settings(config, erase=True).rollout.erase


def test_every_round_draws_anew():
    """Five samples of two rows: three rounds, whose siblings have the same numbers and other draws."""
    config = Config(rollout=rollout(), eval=EvalConfig(num_samples=5))
    engine: Any = ScriptedEngine(levels({}))
    sampler = Sampler(
        policy=type("Policy", (), {"tokenizer": Words()})(),
        prompts=[prompt("p"), prompt("q")],
        config=config,
        scorer=Grader(),  # type: ignore[arg-type]
        reference=None,
    )
    units = Plan(("p", "q"), 5, 2, erase=False).wanted()
    samples = [s for group in sampler._sample(engine, units) for s in group]
    assert sorted(s.sample for s in samples if s.problem == "p") == [0, 1, 2, 3, 4]
    draws = [call.draw for call in engine.made("extend")]
    assert len(set(draws)) == len(draws) == 2 * 5 * 3
    assert {d.step for d in draws} == {0, 1, 2}
    assert {d.seed for d in draws} == {SEED_OFFSET}
