"""A real model: SmolLM2 by vLLM, by the torch engine and by the oracle. `make test-vllm` prints the table."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from e3rl.config import load_config
from e3rl.data.loading import load_problems
from e3rl.data.prompts import render_prompts
from e3rl.engine.protocol import Engine, Sampling
from e3rl.engine.recompute import RecomputeEngine
from e3rl.engine.requests import uniforms
from e3rl.engine.torch.engine import TorchEngine
from e3rl.engine.vllm.core import kv_cache_bytes
from e3rl.errors import UserError
from e3rl.models import Policy, load_policy
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.stats import summarise
from e3rl.types import Candidate, Draw, Prompt, Trajectory

CONFIG = load_config(
    None,
    (),
    [
        "model.path=smollm2",
        "data.train=lab:arith:1-3",
        "rollout.num_generations=4",
        "rollout.segment_length=24",
        "rollout.max_segments=3",
        "erasure.kappa0=0.9",
    ],
)
GROUPS, ROWS, LENGTH = 4, 16, 192
SEED, STEP = 3, 1


@dataclass(frozen=True)
class Loaded:
    policy: Policy
    prompts: list[Prompt]
    core: Any

    def settings(self) -> dict[str, Any]:
        return {"eos_ids": self.policy.eos_ids, "max_rows": ROWS, "cache_rows": ROWS, "max_length": LENGTH}

    def vllm(self) -> Any:
        from e3rl.engine.vllm.engine import VllmEngine

        return VllmEngine(self.policy.model, **self.settings(), core=self.core)


@pytest.fixture(scope="module")
def loaded() -> Iterator[Loaded]:
    from e3rl.engine.vllm.core import VllmCore

    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    policy = load_policy(CONFIG.model)
    problems = load_problems(CONFIG.data.train, config=CONFIG.data, split="train")[:GROUPS]
    limits = {"context_limit": policy.context_length, "completion_limit": CONFIG.rollout.completion_limit}
    prompts = render_prompts(problems, policy.tokenizer, CONFIG.data, **limits)
    core = VllmCore(policy.model, eos_ids=policy.eos_ids, max_rows=ROWS, cache_rows=2 * ROWS, max_length=LENGTH)
    yield Loaded(policy, prompts, core)
    core.close()


def candidates(engine: Engine, prompts: list[Prompt], sampling: Sampling, tokens: int) -> list[Candidate]:
    rows = [engine.prefill(prompt.ids, 1)[0] for prompt in prompts]
    for row, prompt in zip(rows, prompts, strict=True):
        engine.extend(row, tokens, Draw(0, 0, prompt.problem.id, 0, 0, 0), sampling)
    found: dict[int, Candidate] = {}
    while delivered := engine.poll():
        found.update(delivered)
    return [found[row] for row in rows]


def worst(name: str, one: list[Candidate], other: list[Candidate]) -> float:
    pairs = zip(one, other, strict=True)
    return max(float(abs(a - b)) for x, y in pairs for a, b in zip(getattr(x, name), getattr(y, name), strict=True))


@pytest.mark.parametrize("sampling", [Sampling(temperature=1e-3), Sampling(), Sampling(top_p=0.9, top_k=50)], ids=str)
def test_tokens_and_measures_are_the_oracles(loaded: Loaded, sampling: Sampling):
    oracle = RecomputeEngine(loaded.policy.model, eos_ids=loaded.policy.eos_ids, cache_rows=ROWS, max_length=LENGTH)
    expected = candidates(oracle, loaded.prompts[:2], sampling, 24)
    got = candidates(loaded.vllm(), loaded.prompts[:2], sampling, 24)
    assert [c.ids.tolist() for c in got] == [c.ids.tolist() for c in expected]
    differences = {name: worst(name, got, expected) for name in ("entropies", "perturbations", "logprobs")}
    if sampling.temperature >= 1:  # at 0.001 a logit's rounding is multiplied by a thousand
        assert max(differences.values()) < 1e-3
    print(f"\noracle, {sampling}: {sum(len(c.ids) for c in got)} tokens equal, largest differences {differences}")


def roll_out(loaded: Loaded, name: str, engine: Engine) -> list[Trajectory]:
    settings = GroupSettings(CONFIG.rollout, CONFIG.erasure, SEED, step=STEP)
    began = time.perf_counter()
    groups = {g.prompt.problem.id: g for g in run_groups(engine, loaded.prompts, settings)}
    seconds = time.perf_counter() - began
    stats = summarise(groups.values())
    print(
        f"{name}: {stats.generated_tokens} tokens, r = {stats.r:.2f}, {stats.generated_tokens / seconds:.1f} tokens/s"
    )
    return [t for prompt in loaded.prompts for t in groups[prompt.problem.id].trajectories]


@torch.inference_mode()
def distances_from_a_full_pass(loaded: Loaded, trajectory: Trajectory) -> tuple[float, float]:
    """How far any draw is from the token's share of the cumulative distribution, and any entropy from the exact one."""
    prompt = trajectory.prompt
    logits_TV = loaded.policy.model(torch.tensor([[*prompt.ids, *trajectory.ids.tolist()]])).logits[
        0, len(prompt.ids) - 1 : -1
    ]
    logp_TV = logits_TV.double().log_softmax(-1)
    entropies_T = -(logp_TV.exp() * logp_TV).sum(-1)
    upper_T = logp_TV.exp().cumsum(-1).gather(1, torch.tensor(trajectory.ids).long()[:, None]).squeeze(1)
    lower_T = upper_T - logp_TV.exp().gather(1, torch.tensor(trajectory.ids).long()[:, None]).squeeze(1)
    numbers_T = torch.cat(
        [
            torch.from_numpy(
                uniforms(
                    Draw(SEED, STEP, prompt.problem.id, trajectory.sibling, s.index, s.judgement.attempt),
                    len(s.candidate.ids),
                )
            )
            for s in trajectory.segments
        ]
    )
    outside_T = torch.maximum(lower_T - numbers_T, numbers_T - upper_T).clamp(min=0)
    return outside_T.max().item(), (entropies_T - torch.tensor(trajectory.entropies)).abs().max().item()


def test_erasable_rollouts_draw_what_a_full_pass_says(loaded: Loaded):
    """Two engines part where a random number lies within rounding of the border between two tokens; nowhere else."""
    engine = loaded.vllm()
    print()
    expected = roll_out(loaded, "torch engine", TorchEngine(loaded.policy.model, **loaded.settings()))
    got = roll_out(loaded, "vLLM engine", engine)
    erasures, stats = sum(len(t.erasures) for t in got), engine.stats
    same = sum(a.ids.tolist() == b.ids.tolist() for a, b in zip(got, expected, strict=True))
    draws, entropies = zip(*(distances_from_a_full_pass(loaded, t) for t in got), strict=True)
    print(
        f"trajectories as the torch engine's: {same} of {len(got)}; largest distance of a draw from its token "
        f"{max(draws):.1e}, of an entropy {max(entropies):.1e}\nerasures {erasures}; keys and values there already "
        f"{stats.hit_rate:.3f}; run again after a commit {stats.after_commit.mean:.2f} tokens, after an erasure "
        f"{stats.after_erasure.mean:.2f}, most {max(stats.after_commit.most, stats.after_erasure.most)}"
    )
    assert erasures > 0
    assert max(draws) < 1e-4
    assert max(entropies) < 1e-3
    assert (stats.after_commit.most, stats.after_erasure.most) == (1, 1)


@pytest.mark.timeout(600)
def test_with_room_for_a_third_of_the_rows_the_rollout_ends_and_draws_what_a_full_pass_says(loaded: Loaded):
    """Parked siblings give their blocks back and running ones are preempted; they go on with the tokens of their draws."""
    from e3rl.engine.vllm.core import VllmCore

    core = VllmCore(loaded.policy.model, **loaded.settings(), kv_budget=kv_cache_bytes(loaded.policy.model, 1, LENGTH))
    try:
        engine = dataclasses.replace(loaded, core=core).vllm()
        print()
        got = roll_out(loaded, "vLLM with little room", engine)
        draws, entropies = zip(*(distances_from_a_full_pass(loaded, t) for t in got), strict=True)
        again = engine.stats.after_commit.tokens + engine.stats.after_erasure.tokens
        print(f"largest distance of a draw from its token {max(draws):.1e}; {again} tokens ran again")
        assert max(draws) < 1e-4
        assert max(entropies) < 1e-3
        assert max(engine.stats.after_commit.most, engine.stats.after_erasure.most) > 1
        check_a_killed_engine_is_a_sentence(core, engine, loaded.prompts[0])
    finally:
        core.close()


def check_a_killed_engine_is_a_sentence(core: Any, engine: Any, prompt: Prompt) -> None:
    """`kill -9` of vLLM's process in the middle of a segment."""
    [row] = engine.prefill(prompt.ids, 1)
    engine.extend(row, 64, Draw(0, 0, prompt.problem.id, 0, 0, 0), Sampling())
    for process in core._llm.engine_core.resources.engine_manager.processes:
        process.kill()
    with pytest.raises(UserError, match="a process of vLLM's has died"):
        engine.poll()
