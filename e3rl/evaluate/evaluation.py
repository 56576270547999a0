"""Held-out evaluation: every problem sampled k times, plain or with erasable decoding, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from e3rl.config import Config
from e3rl.evaluate.metrics import avg_at_k, bootstrap_interval, pass_at_k_by_problem
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.engine import Engine
from e3rl.rollout.reference import ReferenceStatistics
from e3rl.rollout.scheduler import Scheduler, summarise
from e3rl.train.metrics import mean
from e3rl.types import Group, Problem, Prompt

SEED_OFFSET = 1_000_003
"""Evaluation draws from its own stream of random numbers, the same before and after training."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation. ``correct_PK`` counts a missing reward as wrong and ``missing`` says how many there were."""

    mode: str  # "plain" or "erasable"
    groups: tuple[Group, ...]
    correct_PK: np.ndarray
    missing: int

    def record(self) -> dict[str, Any]:
        """The figures, as they stand in evaluations.jsonl and summary.json."""
        problems, k = self.correct_PK.shape
        avg_P, pass_P = avg_at_k(self.correct_PK), pass_at_k_by_problem(self.correct_PK, k)
        stats = summarise(self.groups)
        trajectories = [t for g in self.groups for t in g.trajectories]
        return {
            "mode": self.mode,
            f"avg@{k}": float(avg_P.mean()),
            f"pass@{k}": float(pass_P.mean()),
            "ci95": list(bootstrap_interval(avg_P)),
            "pass_ci95": list(bootstrap_interval(pass_P)),
            "problems": problems,
            "samples": k,
            "missing": self.missing,
            "tokens": stats.generated_tokens,
            "finish_ratio": mean(t.finish == "stop" for t in trajectories),
            "length": mean(t.committed_tokens for t in trajectories),
            "erase_rate": stats.erase_rate,
            "r": stats.r,
        }


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
    trajectories = [t for g in groups for t in g.trajectories]
    texts = [tokenizer.decode(list(t.ids), skip_special_tokens=True) for t in trajectories]
    rewards = scorer.score(trajectories, texts)
    first = [next(iter(r.parts.values()), None) for r in rewards]
    correct_PK = np.array([value is not None and value >= 1 for value in first]).reshape(len(groups), -1)
    mode = "erasable" if erase else "plain"
    return Evaluation(mode, tuple(groups), correct_PK, sum(value is None for value in first))
