"""The driver on real engines: their records hold, and the slot cache agrees with the engine that recomputes all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from e3rl.config import ErasureConfig, RolloutConfig
from e3rl.engine.protocol import Engine
from e3rl.engine.recompute import RecomputeEngine
from e3rl.engine.torch.engine import TorchEngine
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.stats import summarise
from e3rl.types import Group, Problem, Prompt
from tests.engine.models import EOS, tiny
from tests.rollout.slow_reference import check_decisions, check_numbers, check_shape

ROLLOUT = RolloutConfig(num_generations=3, segment_length=5, max_segments=4, max_completion_length=18)
ERASURE = ErasureConfig(kappa0=-0.5, max_erasures=2, perturbation_weight=0.5, on_exhausted="least_uncertain")
PROMPTS = [Prompt(Problem(f"p{i}", ""), tuple(range(5 + i, 9 + 3 * i))) for i in range(3)]


def torch_engine(max_rows: int = 9, cache_rows: int = 9) -> TorchEngine:
    return TorchEngine(tiny("Qwen3"), eos_ids=EOS, max_rows=max_rows, cache_rows=cache_rows, max_length=64)


def groups_of(engine: Engine, prompts: Iterable[Prompt] = PROMPTS) -> list[Group]:
    groups = run_groups(engine, prompts, GroupSettings(ROLLOUT, ERASURE, seed=1, step=1))
    return sorted(groups, key=lambda g: g.prompt.problem.id)


def tokens_of(groups: Iterable[Group]) -> list[tuple]:
    """Everything that was decided, without the digits that depend on the order of additions."""
    return [
        (
            t.prompt.problem.id,
            t.sibling,
            t.ids.tolist(),
            t.finish,
            [(e.index, e.judgement.attempt, e.candidate.ids.tolist()) for e in t.erasures],
        )
        for g in groups
        for t in g.trajectories
    ]


def test_records_of_a_real_rollout():
    """Were a redraw not its first drawing, `check_decisions` would find that attempt on record twice."""
    engine = torch_engine()
    groups = groups_of(engine)
    for group in groups:
        check_shape(group, ROLLOUT)
        check_decisions(group, ERASURE)
        check_numbers(group, ERASURE)
    stats = summarise(groups)
    assert stats.erasures > 0
    assert stats.redrawn_tokens > 0, "the test is about redraws too"
    assert engine.free_rows() == 9


@pytest.mark.parametrize(("max_rows", "cache_rows"), [(1, 3), (4, 7)])
def test_batching_changes_nothing(max_rows, cache_rows):
    assert tokens_of(groups_of(torch_engine(max_rows, cache_rows))) == tokens_of(groups_of(torch_engine()))


def test_the_oracle_agrees():
    oracle = RecomputeEngine(tiny("Qwen3"), eos_ids=EOS, cache_rows=9, max_length=64)
    assert tokens_of(groups_of(oracle)) == tokens_of(groups_of(torch_engine()))


def test_what_is_drawn_at_one_temperature_can_be_judged_at_another():
    rollout = replace(ROLLOUT, temperature=0.5)
    settings = GroupSettings(rollout, ERASURE, seed=1, step=1)
    warmer = replace(settings, erasure=replace(ERASURE, entropy_temperature=1.0))
    judged, own = (run_groups(torch_engine(), PROMPTS[:1], s) for s in (warmer, settings))
    first, other = (next(iter(groups)).trajectories[0] for groups in (judged, own))
    candidate = min((e for e in first.erasures if e.index == 0), key=lambda e: e.judgement.attempt).candidate
    same = min((e for e in other.erasures if e.index == 0), key=lambda e: e.judgement.attempt).candidate
    assert candidate.ids.tolist() == same.ids.tolist()
    assert candidate.logprobs.tolist() == same.logprobs.tolist()
    ids = torch.tensor([*PROMPTS[0].ids, *candidate.ids])
    with torch.no_grad():
        logits_TV = tiny("Qwen3")(ids[None]).logits[0, len(PROMPTS[0].ids) - 1 : -1]
    exact_T = torch.distributions.Categorical(logits=logits_TV).entropy()
    assert candidate.entropies == pytest.approx(exact_T.tolist(), abs=1e-5)
    assert candidate.perturbations == pytest.approx([x / 2 for x in same.perturbations], abs=1e-6)
    assert candidate.entropies != pytest.approx(same.entropies, abs=1e-2)
