"""What is sampled, how it is counted and how draws are named, of a scripted engine."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Barrier
from typing import Any

import pytest

from e3rl.config import Config, EvalConfig, RolloutConfig
from e3rl.evaluate.evaluation import SEED_OFFSET, evaluate, evaluation_settings, held_out_records
from e3rl.evaluate.figures import evaluated_name, overall
from e3rl.evaluate.samples import Sample, graded
from e3rl.evaluate.study import Sampler, SamplingPlan
from e3rl.testing.scripted import ScriptedEngine
from e3rl.types import Draw, Reward, Trajectory
from tests.rollout.worlds import ALONE, MEAN_ONLY, levels, prompt, roll, rollout


class Words:
    """A tokenizer that says how many tokens there are."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(len(ids))


class Grader:
    """The first function gives 0.5, which is not right; the second is not looked at."""

    unboxed = "last"

    def score(self, trajectories: Sequence[Trajectory], texts: Sequence[str]) -> list[Reward]:
        return [Reward(None, {"first": 0.5, "second": 1.0}) for _ in trajectories]


def test_a_sample_is_charged_for_all_that_was_drawn_for_it():
    """6 tokens are committed, 4 erased, and 2 drawn a second time to be committed after all."""
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


class Tokenized:
    """A policy of which nothing but the tokenizer is used."""

    tokenizer = Words()


def _drawn(siblings: int, *, samples: int = 5, erase: bool = False) -> tuple[list[Draw], list[Sample]]:
    """Samples of two problems with so many rows a round, and the draws that they asked for."""
    config = Config(rollout=rollout(num_generations=siblings), eval=EvalConfig(num_samples=samples))
    engine: Any = ScriptedEngine(levels({}))
    prompts, mode = [prompt("p"), prompt("q")], "erasable" if erase else "plain"
    sampler = Sampler(Tokenized(), prompts, config, Grader(), None)  # type: ignore[arg-type]
    units = [u for u in SamplingPlan(("p", "q"), config, erase).wanted() if u.mode == mode]
    found = [s for group in sampler._sample(engine, units) for s in group]
    return [call.draw for call in engine.made("extend")], found


def test_draws_are_named_by_the_sample_whatever_the_rounds():
    """Five samples in two rounds, in one: the same draws, each once."""
    for erase in (False, True):
        by_rounds = [_drawn(siblings, erase=erase) for siblings in (2, 3, 5)]  # 3 + 2 with two and three
        draws, samples = by_rounds[0]
        assert sorted(s.sample for s in samples if s.problem == "p") == [0, 1, 2, 3, 4]
        firsts = [d for d in draws if d.attempt == 0]
        assert len(set(draws)) == len(draws)
        assert len(firsts) == 2 * 5 * 3
        assert {d.sibling for d in draws} == {0, 1, 2, 3, 4}
        assert {(d.seed, d.step) for d in draws} == {(SEED_OFFSET, 0)}
        assert all({d for d in other if d.attempt == 0} == set(firsts) for other, _ in by_rounds)


def test_training_and_the_command_draw_alike():
    """`evaluate`, which training calls, asks for what `e3rl eval` asks for, and gives as many samples."""
    config = Config(rollout=rollout(num_generations=2), eval=EvalConfig(num_samples=5))
    engine: Any = ScriptedEngine(levels({}))
    result = evaluate(engine, [prompt("p"), prompt("q")], Grader(), Words(), config, erase=False)  # type: ignore[arg-type]
    assert [call.draw for call in engine.made("extend")] == _drawn(2)[0]
    assert [[s.sample for s in row] for row in result.samples_PK] == [[0, 1, 2, 3, 4]] * 2
    assert result.trajectories_PK == ()


def test_rounds_share_the_rows_and_none_waits_for_the_last_sample_of_another():
    config = Config(rollout=rollout(num_generations=2), eval=EvalConfig(num_samples=6))
    engine: Any = ScriptedEngine(levels({}))
    evaluate(engine, [prompt("p"), prompt("q")], Grader(), Words(), config, erase=False)  # type: ignore[arg-type]
    names = [call.kind for call in engine.calls]
    assert names.count("prefill") == 2 * 6  # rows
    assert "release" not in names[: len(names) - names[::-1].index("prefill")]


def _held_out(config: Config, sources: Sequence[str], done: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    engine: Any = ScriptedEngine(levels({}))
    prompts = {source: [prompt("p"), prompt(f"q{i}")][: 1 + i] for i, source in enumerate(sources)}
    return list(held_out_records(engine, prompts, Grader(), Words(), config, calibration=None, done=done))  # type: ignore[arg-type]


def test_several_sources_have_figures_each_and_a_mean():
    config = Config(rollout=rollout(num_generations=2), eval=EvalConfig(num_samples=3, erasable=False))
    [one] = _held_out(config, ["a"])
    assert "data" not in one
    found = _held_out(config, ["a", "b"])
    assert [r["data"] for r in found] == ["a", "b", "mean"]
    assert [r["problems"] for r in found] == [1, 2, 3]
    assert {k: v for k, v in found[0].items() if k != "data"} == one
    assert [evaluated_name(r) for r in found] == ["plain, a", "plain, b", "plain"]
    assert overall(found) == [found[2]]
    assert overall([one]) == [one]
    assert _held_out(config, ["a", "b"], done=found[:2]) == found[2:], "a resumed run draws what is missing"
    assert _held_out(config, ["a", "b"], done=found) == []


@dataclass(frozen=True)
class _Peer:
    """One of several threads that draw together."""

    number: int
    values: list[Any]
    met: Barrier

    def share(self, items: Sequence[Any]) -> list[Any]:
        return list(items[self.number :: len(self.values)])

    def gather(self, value: Any) -> list[Any]:
        self.values[self.number] = value
        self.met.wait(30)
        return list(self.values)


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("peers", [2, 3])
def test_any_number_of_processes_draws_and_grades_alike(erase: bool, peers: int):
    """Each draws a share of the groups and has the whole in the end: what one process has, in its order."""
    config = Config(rollout=rollout(num_generations=2), eval=EvalConfig(num_samples=5))
    prompts = [prompt("p"), prompt("q"), prompt("r")]

    def drawn(peer: _Peer | None) -> tuple[Any, int]:
        engine: Any = ScriptedEngine(levels({}))
        found = evaluate(engine, prompts, Grader(), Words(), config, erase=erase, peers=peer)  # type: ignore[arg-type]
        return found, len({(c.draw.prompt_id, c.draw.sibling) for c in engine.made("extend")})

    alone, all_samples = drawn(None)
    values, met = [None] * peers, Barrier(peers)
    with ThreadPoolExecutor(peers) as pool:
        together = list(pool.map(drawn, [_Peer(number, values, met) for number in range(peers)]))
    assert all(found == alone for found, _ in together)
    assert all(0 < samples < all_samples for _, samples in together)
    assert sum(samples for _, samples in together) == all_samples
