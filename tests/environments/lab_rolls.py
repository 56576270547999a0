"""Rollouts of the embedded model that calls a tool, with both levels of erasing, on any engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from e3rl.cli.recipes import find_recipe
from e3rl.config import Config, load_config
from e3rl.data.loading import load_problems
from e3rl.engine.protocol import Engine
from e3rl.environments.episodes import tool_prompts
from e3rl.models import Policy
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.types import Group, Trajectory

LONGEST = 512
EVERYTHING = {"erasures before a call", "turns taken back", "failed calls that stayed", "right calls"}
OWN = ("rollout.num_generations=4", "data.train_limit=3", 'environments.erase="errors"')


def configured(*own: str) -> Config:
    """`e3rl train tools-demo` with level B as well."""
    return load_config(find_recipe("tools-demo"), [], [*OWN, *own])


def rolled(engine: Engine, policy: Policy, config: Config, memory: Any = None) -> list[Group]:
    """The groups of the run's first problems, in order."""
    problems = load_problems(config.data.train, config=config.data, split="train")
    limits = {"context_limit": LONGEST, "completion_limit": config.rollout.completion_limit}
    prompts = tool_prompts(problems, policy.tokenizer, config, **limits, ends=policy.eos_ids)
    found = run_groups(engine, prompts, GroupSettings(config.rollout, config.erasure, seed=1), memory=memory)
    return sorted(found, key=lambda group: group.prompt.problem.id)


def trajectories(groups: list[Group]) -> Iterator[Trajectory]:
    for group in groups:
        yield from group.trajectories


def kinds(groups: list[Group]) -> set[str]:
    """What happened at least once."""
    all_of_them = list(trajectories(groups))
    kept = [c for t in all_of_them for s in t.segments if s.observation for c in s.observation.calls]
    erased = [e for t in all_of_them for e in t.erasures]
    return {"erasures before a call" if e.observation is None else "turns taken back" for e in erased} | {
        "failed calls that stayed" if call.failed else "right calls" for call in kept
    }
