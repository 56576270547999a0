"""The lab's reward function: 1 for a right final answer, else 0. It has the signature of TRL's reward functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from e3rl.config import Config, RewardsConfig
from e3rl.lab.problems import FAMILIES


def _text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """A completion's text: itself, or the content of its last chat message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def lab_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    answer: Sequence[str | None],
    family: Sequence[str | None],
    question: Sequence[str | None],
    **columns: Any,
) -> list[float | None]:
    """One reward for each completion; None for a row that is no lab problem."""
    rewards: list[float | None] = []
    for completion, expected, name, asked in zip(completions, answer, family, question, strict=True):
        if name not in FAMILIES or expected is None or asked is None:
            rewards.append(None)
        else:
            rewards.append(float(FAMILIES[name].grade(asked, expected, _text(completion))))
    return rewards


def graded_by_the_lab(config: Config, data: str) -> Config:
    """The config with the lab's own reward, if ``data`` are lab problems and no other reward was asked for.

    A path through a graph is no formula: `math` would accept ``ba`` for ``ab``, and reject the other one of two right paths.
    """
    if not data.startswith("lab:") or config.rewards != RewardsConfig():
        return config
    return replace(config, rewards=replace(config.rewards, functions=("lab",)))
