"""Turns with a tool on vLLM: calls, results, erased segments and turns taken back are those of the torch engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from e3rl.cli.recipes import find_recipe
from e3rl.config import Config, load_config
from e3rl.data.loading import load_problems
from e3rl.engine.protocol import Engine
from e3rl.engine.torch.engine import TorchEngine
from e3rl.environments.episodes import tool_prompts
from e3rl.models import Policy, load_policy
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.types import Trajectory

PROBLEMS, ROWS = 3, 12
OWN = ("rollout.num_generations=4", "data.train_limit=3", 'environments.erase="errors"')
LONGEST = 512
BOTH = {"erasures before a call", "turns taken back", "failed calls that stayed", "right calls"}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(configured().model)


@pytest.fixture(scope="module")
def tool_core(policy: Policy) -> Iterator[Any]:
    from e3rl.engine.vllm.core import VllmCore

    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    core = VllmCore(policy.model, eos_ids=policy.eos_ids, max_rows=ROWS, cache_rows=2 * ROWS, max_length=LONGEST)
    yield core
    core.close()


def configured(*own: str) -> Config:
    return load_config(find_recipe("tools-demo"), [], [*OWN, *own])


def rolled(engine: Engine, policy: Policy, config: Config) -> list[Trajectory]:
    problems = load_problems(config.data.train, config=config.data, split="train")[:PROBLEMS]
    limits = {"context_limit": LONGEST, "completion_limit": config.rollout.completion_limit}
    prompts = tool_prompts(problems, policy.tokenizer, config, **limits, ends=policy.eos_ids)
    settings = GroupSettings(config.rollout, config.erasure, seed=1)
    groups = sorted(run_groups(engine, prompts, settings), key=lambda group: group.prompt.problem.id)
    return [trajectory for group in groups for trajectory in group.trajectories]


def told(trajectories: list[Trajectory]) -> list[Any]:
    """What a trajectory became, turn by turn; the seconds of its tools left out."""

    def seen(observed: Any) -> Any:
        return observed and (observed.calls, observed.state, observed.forced)

    return [
        (
            t.ids.tolist(),
            t.drawn_T.tolist(),
            t.finish,
            [(s.index, len(s.candidate.ids), seen(s.observation)) for s in t.segments],
            [(e.start, e.candidate.ids.tolist(), seen(e.observation)) for e in t.erasures],
        )
        for t in trajectories
    ]


def kinds(trajectories: list[Trajectory]) -> set[str]:
    """What happened at least once."""
    kept = [c for t in trajectories for s in t.segments if s.observation for c in s.observation.calls]
    erased = [e.observation is None for t in trajectories for e in t.erasures]
    names = {True: "erasures before a call", False: "turns taken back"}
    stayed = {True: "failed calls that stayed", False: "right calls"}
    return {names[e] for e in erased} | {stayed[c.failed] for c in kept}


@pytest.mark.parametrize("isolate", [False, True], ids=["in this process", "isolated"])
def test_tools_on_vllm_are_tools_on_torch(policy: Policy, tool_core: Any, isolate: bool):
    from e3rl.engine.vllm.engine import VllmEngine

    config = configured(f"environments.isolate={str(isolate).lower()}")
    held = {"eos_ids": policy.eos_ids, "max_rows": ROWS, "cache_rows": ROWS, "max_length": LONGEST}
    theirs = rolled(VllmEngine(policy.model, **held, core=tool_core), policy, config)
    ours = rolled(TorchEngine(policy.model, **held), policy, config)
    assert told(theirs) == told(ours)
    assert kinds(ours) == BOTH
    for vllm, plain in zip(theirs, ours, strict=True):
        torch.testing.assert_close(torch.tensor(vllm.logprobs), torch.tensor(plain.logprobs), atol=1e-4, rtol=0)
