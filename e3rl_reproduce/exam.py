"""The measure that most studies take: accuracy on named benchmarks, with the counts that any Pass@k is computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from e3rl.config import Config
from e3rl.data.loading import load_problems
from e3rl.data.prompts import render_prompts
from e3rl.engine.build import build_engine
from e3rl.evaluate.evaluation import evaluate, spread
from e3rl.models import Policy
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.statistics import ReferenceStatistics

NAME = "e3rl_reproduce.exam:exam"
SEED = 1_000_003
"""Exams draw from their own stream of random numbers."""


def exam(
    policy: Policy,
    config: Config,
    *,
    benchmarks: Mapping[str, str],
    problems: int,
    samples: int,
    erase: bool = False,
    split: Literal["train", "eval"] = "eval",
    temperature: float = 1.0,
    reference: ReferenceStatistics | None = None,
) -> dict[str, Any]:
    """Right answers of ``samples`` to each problem of each benchmark (name to source), plain or with erasable decoding."""
    chosen = replace(config.eval, num_samples=samples, temperature=temperature)
    config = replace(config, eval=chosen)
    limits = {"context_limit": policy.context_length, "completion_limit": config.rollout.completion_limit}
    loaded = {
        name: render_prompts(
            spread(load_problems(source, config=config.data, split=split), problems),
            policy.tokenizer,
            config.data,
            **limits,
        )
        for name, source in benchmarks.items()
    }
    longest = max(len(prompt.ids) for prompts in loaded.values() for prompt in prompts)
    engine = build_engine(config.rollout, policy.model, policy.eos_ids, longest)
    results: dict[str, Any] = {}
    with Scorer(config.rewards, max_completion_length=config.rollout.completion_limit) as scorer:
        for name, prompts in loaded.items():
            done = evaluate(engine, prompts, scorer, policy.tokenizer, config, erase=erase, reference=reference)
            record = done.record()
            kept = {key: record[key] for key in ("tokens", "finish_ratio", "boxed", "length", "r", "missing")}
            results[name] = {"right": done.correct_PK.sum(axis=1).tolist(), "samples": samples, **kept}
    return results


def score(result: Mapping[str, Any], metric: str, k: int) -> float:
    """``avg`` or ``pass`` at k of one benchmark of an exam, or ``boxed``, its share of responses with a boxed answer."""
    from e3rl.evaluate.metrics import pass_at_k

    if metric == "boxed":
        return float(result["boxed"])
    right: Sequence[int] = result["right"]
    if metric == "avg":
        return sum(right) / len(right) / result["samples"]
    return sum(pass_at_k(c, result["samples"], k) for c in right) / len(right)
