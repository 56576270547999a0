"""Measures of a model: `exam`, accuracy on named benchmarks; `decodings`, one model decoded in several ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from e3rl.cluster.rollouts import evaluation_draws
from e3rl.config import Config
from e3rl.data.loading import load_problems, spread
from e3rl.data.prompts import render_prompts
from e3rl.diagnose.decoding import SETTINGS
from e3rl.engine.build import build_engine
from e3rl.evaluate.evaluation import evaluate
from e3rl.evaluate.metrics import pass_at_k
from e3rl.models import Policy
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.statistics import CalibrationStatistics
from e3rl.types import Prompt

EXAM = "e3rl_reproduce.measures:exam"
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
    calibration: CalibrationStatistics | None = None,
) -> dict[str, Any]:
    """Right answers of ``samples`` to each problem of each benchmark (name to source), plain or with erasable decoding.

    Sampling follows [eval] of the config; the config's workers or servers generate, if it has any.
    """
    config = replace(config, eval=replace(config.eval, num_samples=samples))
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
    results: dict[str, Any] = {}
    with (
        Scorer(config.rewards, max_completion_length=config.rollout.completion_limit) as scorer,
        evaluation_draws(config, policy, longest) as engine,
    ):
        for name, prompts in loaded.items():
            done = evaluate(engine, prompts, scorer, policy.tokenizer, config, erase=erase, calibration=calibration)
            record = done.record()
            kept = {key: record[key] for key in ("tokens", "finish_ratio", "boxed", "length", "r", "missing")}
            results[name] = {"right": done.correct_PK.sum(axis=1).tolist(), "samples": samples, **kept}
    return results


def score(result: Mapping[str, Any], metric: str, k: int) -> float:
    """``avg`` or ``pass`` at k of one benchmark of an exam, or ``boxed``, its share of responses with a boxed answer."""
    if metric == "boxed":
        return float(result["boxed"])
    right: Sequence[int] = result["right"]
    if metric == "avg":
        return sum(right) / len(right) / result["samples"]
    return sum(pass_at_k(c, result["samples"], k) for c in right) / len(right)


DECODINGS = "e3rl_reproduce.measures:decodings"
Kind = Literal["plain", "erasable"]


@dataclass(frozen=True)
class DecodingWay:
    """A way to decode: a temperature and, where it erases, a setting of `e3rl.diagnose.decoding.SETTINGS`."""

    temperature: float
    setting: str = ""

    @property
    def kind(self) -> Kind:
        return "erasable" if self.setting else "plain"

    @property
    def name(self) -> str:
        title = SETTINGS[self.setting].title if self.setting else "plain"
        return f"{title}, T = {self.temperature:g}"


def decodings(
    policy: Policy, config: Config, *, tuning: int, problems: int, samples: int, ways: Sequence[tuple[float, str]]
) -> dict[str, Any]:
    """For each `DecodingWay`: its kind and, per half of the data, right answers by problem and tokens per answer."""
    limit = config.rollout.completion_limit
    prompts = {
        "train": _prompts(policy, config, "train", tuning),
        "eval": _prompts(policy, config, "eval", problems),
    }
    engine = build_engine(
        config.rollout, policy.model, policy.eos_ids, max(len(p.ids) for half in prompts.values() for p in half)
    )
    found: dict[str, Any] = {}
    with Scorer(config.rewards, max_completion_length=limit) as scorer:
        for way in (DecodingWay(*fields) for fields in ways):
            chosen = SETTINGS[way.setting].applied(config) if way.setting else config
            sampling = replace(config.eval, num_samples=samples, temperature=way.temperature)
            run = replace(config.run, seed=SEED)
            settings = replace(chosen, eval=sampling, run=run)
            halves = {
                half: _examined(engine, asked, scorer, policy.tokenizer, settings, way)
                for half, asked in prompts.items()
            }
            found[way.name] = {"kind": way.kind, **halves}
    return found


def _prompts(policy: Policy, config: Config, half: Literal["train", "eval"], count: int) -> list[Prompt]:
    chosen = spread(load_problems(config.data.train, config=config.data, split=half), count)
    return render_prompts(
        chosen,
        policy.tokenizer,
        config.data,
        context_limit=policy.context_length,
        completion_limit=config.rollout.completion_limit,
    )


def _examined(
    engine: Any, prompts: Sequence[Prompt], scorer: Scorer, tokenizer: Any, config: Config, way: DecodingWay
) -> Mapping[str, Any]:
    done = evaluate(engine, prompts, scorer, tokenizer, config, erase=way.kind == "erasable")
    return {
        "right": done.correct_PK.sum(axis=1).tolist(),
        "samples": int(done.correct_PK.shape[1]),
        "tokens": done.record()["tokens"] / done.correct_PK.size,
    }
