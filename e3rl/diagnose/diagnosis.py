"""The whole diagnosis of a model on problems: signals, retries, decoding, and what follows from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from e3rl.config import Config
from e3rl.data.loading import load_problems, spread
from e3rl.data.prompts import render_prompts
from e3rl.diagnose.decoding import SETTINGS, TEMPERATURES, Contest, Decoding, compare, contest
from e3rl.diagnose.labels import knows_steps, require_rewards
from e3rl.diagnose.sampling import First, Fork, Observation, Tell, choose_forks, firsts, retry, roll_out
from e3rl.diagnose.signals import LATE, RESPONSE_SIGNALS, SIGNALS
from e3rl.diagnose.statistics import (
    UNKNOWN,
    Estimate,
    mean_by_problem,
    overall_auroc,
    safe_threshold,
    within_prefix_auroc,
)
from e3rl.engine.build import build_engine
from e3rl.errors import UserError
from e3rl.models import Policy
from e3rl.rewards.scorer import Scorer
from e3rl.types import Prompt

QUANTILES = 4
EVERYWHERE = -1.0
"""An edge below all values: no signal is negative."""
CONFIDENCE = 0.95
"""Of the claim that redrawing above a threshold is worth its tokens, for all thresholds of all signals together."""
RETRY_SIGNALS = ("U, paper", "ε, mean", "cross-entropy")


@dataclass(frozen=True)
class Signal:
    """How well a signal finds wrong segments: among all, and among draws from the same prefix."""

    name: str
    meaning: str
    late: bool
    overall: Estimate
    within: Estimate


@dataclass(frozen=True)
class RetryGain:
    """P(right | retry) − P(right | first) in each quantile of a signal, from calm to suspicious.

    ``above``: the edge above which a retry is surely worth its tokens (`safe_threshold`); None: nowhere, -1: everywhere.
    """

    signal: str
    gains: tuple[Estimate, ...]
    edges: tuple[float, ...]
    above: float | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was measured. ``by_steps``: segments were judged by their own steps, not by the final answer."""

    model: str
    data: str
    problems: int
    samples: int
    retries: int
    segment_length: int
    segments: float  # of a response, on average
    by_steps: bool
    accuracy: Estimate
    mixed_groups: float  # share of groups with right and wrong answers: what a group-normalised objective learns from
    signals: tuple[Signal, ...]
    responses: tuple[Signal, ...]  # the same question of whole responses to one problem, against their final answers
    gains: tuple[RetryGain, ...]
    decodings: tuple[Decoding, ...]
    contest: Contest
    seconds: float

    def to_tables(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def assess_signals(every: Sequence[Observation], siblings: Sequence[Observation]) -> tuple[Signal, ...]:
    """Every signal against every label: ``siblings`` are the observations whose prefix others share."""
    return tuple(
        Signal(name, meaning, name in LATE, _overall(every, name), _within(siblings, name))
        for name, meaning in SIGNALS.items()
    )


def _overall(observations: Sequence[Observation], name: str) -> Estimate:
    known = [o for o in observations if name in o.signals]
    scores, wrong = np.array([o.signals[name] for o in known]), np.array([o.wrong for o in known], dtype=bool)
    return overall_auroc(scores, wrong, np.array([o.problem for o in known])) if known else UNKNOWN


def _within(observations: Sequence[Observation], name: str) -> Estimate:
    known = [o for o in observations if name in o.signals]
    scores, wrong = np.array([o.signals[name] for o in known]), np.array([o.wrong for o in known], dtype=bool)
    prefix, problem = np.array([o.prefix for o in known]), np.array([o.problem for o in known])
    return within_prefix_auroc(scores, wrong, prefix, problem) if known else UNKNOWN


def assess_responses(samples: Sequence[First]) -> tuple[Signal, ...]:
    """Does a whole response's mean entropy, ε or cross-entropy tell right answers to a problem from wrong ones?

    If entropy does but the entropy of the wrong segment does not, mistakes show later: use longer segments.
    """
    problem = np.array([f.trajectory.prompt.problem.id for f in samples])
    wrong = np.array([not f.right for f in samples])
    found = []
    for name, (meaning, value) in RESPONSE_SIGNALS.items():
        scores = np.array([value(f.trajectory) for f in samples])
        overall, within = overall_auroc(scores, wrong, problem), within_prefix_auroc(scores, wrong, problem, problem)
        found.append(Signal(name, meaning, True, overall, within))
    return tuple(found)


def assess_retries(forks: Sequence[Fork], rate: float = 0.0) -> tuple[RetryGain, ...]:
    """The gain of redrawing a segment, by quantile of each signal at the time of judging. ``rate``: right answers that a token of
    plain decoding gives."""
    worth = np.array([f.retries_right - f.first_right - rate * f.extra_tokens for f in forks])
    confidence = 1 - (1 - CONFIDENCE) / len(RETRY_SIGNALS)
    gain = np.array([f.retries_right - f.first_right for f in forks])
    problem = np.array([f.problem for f in forks])
    found = []
    for name in RETRY_SIGNALS:
        values = np.array([f.signals[name] for f in forks])
        edges = np.quantile(values, np.linspace(0, 1, QUANTILES + 1)[1:-1])
        quantile = np.searchsorted(edges, values)
        gains = tuple(mean_by_problem(gain[quantile == q], problem[quantile == q]) for q in range(QUANTILES))
        above = safe_threshold(values, worth, problem, [EVERYWHERE, *edges], confidence)
        found.append(RetryGain(name, gains, tuple(float(e) for e in edges), above))
    return tuple(found)


def observations_of(samples: Sequence[First]) -> tuple[list[Observation], list[Observation]]:
    """All judged segments of the first samples, and those whose prefix is shared by siblings: the first ones."""
    every = [
        Observation(first.trajectory.prompt.problem.id, "", signals, wrong)
        for first in samples
        for signals, wrong in zip(first.signals_N, first.wrong_N, strict=False)
    ]
    starts = [
        Observation(o.trajectory.prompt.problem.id, o.trajectory.prompt.problem.id, o.signals_N[0], o.wrong_N[0])
        for o in samples
    ]
    return every, starts


def _mixed(samples: Sequence[First]) -> int:
    """Problems with right and wrong answers."""
    outcomes = {(first.trajectory.prompt.problem.id, first.right) for first in samples}
    return len(outcomes) - len({problem for problem, _ in outcomes})


def _prompts(policy: Policy, data: str, config: Config, problems: int) -> list[Prompt]:
    """Some problems of the data, evenly spread, as the model sees them."""
    chosen = spread(load_problems(data, config=config.data, split="eval"), problems)
    if len(chosen) < 4:
        raise UserError(f"a diagnosis with intervals needs at least 4 problems, and {data} gives {len(chosen)}")
    limits = {"context_limit": policy.context_length, "completion_limit": config.rollout.completion_limit}
    return render_prompts(chosen, policy.tokenizer, config.data, **limits)


def diagnose(
    policy: Policy,
    data: str,
    config: Config,
    *,
    problems: int,
    retries: int,
    temperatures: Sequence[float] = TEMPERATURES,
    settings: Sequence[str] = tuple(SETTINGS),
    own_settings: bool,
    report: Callable[[str], None] = lambda text: None,
    tell: Tell = lambda activity, done, of: None,
) -> Diagnosis:
    """Measure everything on ``problems`` problems of ``data``; ``report`` gets the name of each part, ``tell`` its progress."""
    began = time.perf_counter()
    prompts = _prompts(policy, data, config, problems)
    by_steps = knows_steps([p.problem for p in prompts])
    engine = build_engine(config.rollout, policy.model, policy.eos_ids, max(len(p.ids) for p in prompts))
    with Scorer(config.rewards, max_completion_length=config.rollout.completion_limit) as scorer:
        report(f"{len(prompts)} problems × {config.rollout.num_generations} samples")
        groups = roll_out(engine, prompts, config, tell)
        samples, faults = firsts(groups, scorer, policy.tokenizer, by_steps)
        require_rewards(faults)
        report(f"{len(samples)} prefixes × {retries} retries")
        chosen = choose_forks(samples, config.run.seed)
        forks, siblings = retry(engine, scorer, policy.tokenizer, config, chosen, retries, by_steps, tell)
        report("decoding: plain, votes, erasable")
        ways = {"temperatures": temperatures, "settings": settings, "own": own_settings, "tell": tell}
        decodings = compare(engine, prompts, scorer, policy.tokenizer, config, **ways)  # type: ignore[arg-type]
    every, starts = observations_of(samples)
    right = np.array([f.right for f in samples], dtype=float)
    names = [f.trajectory.prompt.problem.id for f in samples]
    return Diagnosis(
        model=policy.source,
        data=data,
        problems=len(prompts),
        samples=config.rollout.num_generations,
        retries=retries,
        segment_length=config.rollout.segment_length,
        segments=sum(len(f.trajectory.segments) for f in samples) / len(samples),
        by_steps=by_steps,
        accuracy=mean_by_problem(right, np.array(names)),
        mixed_groups=_mixed(samples) / len(prompts),
        signals=assess_signals(every, [*starts, *siblings]),
        responses=assess_responses(samples),
        gains=assess_retries(forks, right.sum() / sum(len(f.trajectory.ids) for f in samples)),
        decodings=tuple(decodings),
        contest=contest(decodings),
        seconds=time.perf_counter() - began,
    )
