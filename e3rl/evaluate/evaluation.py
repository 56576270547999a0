"""Held-out evaluation: every problem sampled k times, plain or with erasable decoding, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from e3rl.config import Config
from e3rl.engine.protocol import Engine
from e3rl.evaluate.figures import correct_table, figures
from e3rl.evaluate.samples import Sample, graded
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.scheduler import Scheduler
from e3rl.rollout.statistics import ReferenceStatistics
from e3rl.types import Group, Problem, Prompt

SEED_OFFSET = 1_000_003
"""Evaluation draws from its own stream of random numbers, the same before and after training."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation. ``correct_PK`` counts a missing reward as wrong and ``missing`` says how many there were."""

    mode: str  # "plain" or "erasable"
    groups: tuple[Group, ...]
    samples_PK: tuple[tuple[Sample, ...], ...]

    @property
    def correct_PK(self) -> np.ndarray:
        return correct_table(self.samples_PK)

    @property
    def missing(self) -> int:
        return sum(s.correct is None for row in self.samples_PK for s in row)

    def record(self) -> dict[str, Any]:
        """The figures, as they stand in evaluations.jsonl and summary.json."""
        return figures(self.mode, self.samples_PK)


def spread(problems: Sequence[Problem], limit: int) -> list[Problem]:
    """``limit`` of the problems, evenly spread: data are often sorted by difficulty. 0 keeps all."""
    count = min(limit or len(problems), len(problems))
    return [problems[i * len(problems) // count] for i in range(count)]


def evaluation_settings(config: Config, *, erase: bool) -> Config:
    """The run's settings with evaluation's own sampling in place of training's."""
    chosen = config.eval
    rollout = replace(
        config.rollout,
        erase=erase,
        num_generations=chosen.num_samples,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        top_k=chosen.top_k,
    )
    return replace(config, rollout=rollout)


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    tokenizer: Any,
    config: Config,
    *,
    erase: bool,
    reference: ReferenceStatistics | None = None,
) -> Evaluation:
    """Sample every prompt ``eval.num_samples`` times and grade the answers with the run's first reward function."""
    settings = evaluation_settings(config, erase=erase)
    seed = config.run.seed + SEED_OFFSET
    scheduler = Scheduler(engine, settings.rollout, settings.erasure, seed=seed, reference=reference)
    order = {prompt.problem.id: i for i, prompt in enumerate(prompts)}
    groups = sorted(scheduler.run(prompts, step=0, policy_version=0), key=lambda g: order[g.prompt.problem.id])
    mode = "erasable" if erase else "plain"
    samples = tuple(graded(group, scorer, tokenizer, mode=mode) for group in groups)
    return Evaluation(mode, tuple(groups), samples)
