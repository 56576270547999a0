"""Reward functions from outside, tried on a few responses before a run: what would fail on every batch is refused now."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from e3rl.config import RewardsConfig
from e3rl.errors import UserError
from e3rl.rewards.adapters import RewardFunction
from e3rl.rewards.builtin import REWARDS
from e3rl.rewards.scorer import Scorer
from e3rl.types import Trajectory


def broken(name: str, clause: str) -> UserError:
    """The error that names the reward function and the clause of the contract that it breaks."""
    return UserError(f"reward '{name}' breaks its contract: {clause}. See docs/extend.md.")


def check_rewards_run(
    config: RewardsConfig,
    functions: Sequence[RewardFunction],
    trajectories: Sequence[Trajectory],
    texts: Sequence[str],
    max_completion_length: int,
) -> None:
    """Call ``functions``, or the config's that are not built in, and refuse one that fails on all the responses.

    Failing on some is allowed: those rewards are missing. They run where the config says, isolated ones in a worker.
    """
    unweighted = dataclasses.replace(config, weights=())
    alone: list[tuple[str | None, Scorer]] = [
        (None, Scorer(unweighted, functions=(function,), max_completion_length=max_completion_length))
        for function in functions
    ]
    if not functions:
        outside = [name for name in config.functions if name not in REWARDS]
        alone = [
            (
                name,
                Scorer(dataclasses.replace(unweighted, functions=(name,)), max_completion_length=max_completion_length),
            )
            for name in outside
        ]
    for name, scorer in alone:
        with scorer:
            scorer.score(trajectories, texts)
        for short_name, count in scorer.counters.errors.items():
            if count == len(trajectories):
                raise broken(name or short_name, f"it {scorer.counters.first_errors[short_name]}")
