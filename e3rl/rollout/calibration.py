"""Calibration (D7): how often a setting would erase for a given model and prompts, before anything is spent on it.

One set of unjudged rollouts serves the whole grid: the production judge is replayed over it with each setting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from e3rl.config import ErasureConfig
from e3rl.rollout.judge import GroupJudge
from e3rl.types import Group, Judgement


@dataclass(frozen=True)
class Setting:
    """One point of the grid, and what it would do. ``r_low`` and ``r_high`` bound the regeneration ratio: retries that
    are as good as a sibling's draw, and retries that are no better than what they replace."""

    erasure: ErasureConfig
    erase_share: float
    r_low: float
    r_high: float


def strictness(erasure: ErasureConfig) -> str:
    """Name of the setting that says how much is erased; the larger its value, the less."""
    return {"quantile": "quantile", "static": "static_baseline"}.get(erasure.baseline, "kappa0")


def _replayed(group: Group, erasure: ErasureConfig) -> list[Judgement]:
    """Judgements of every segment of a plain group, as if it had been generated under ``erasure`` without budget."""
    unspent = replace(erasure, max_erasures=0)
    judge = GroupJudge(len(group.trajectories), unspent)
    judgements: list[Judgement] = []
    longest = max(len(t.segments) for t in group.trajectories)
    for n in range(longest):
        present = [t for t in group.trajectories if len(t.segments) > n]
        for trajectory in group.trajectories:
            if len(trajectory.segments) == n:
                judge.finish(trajectory.sibling)
        for trajectory in present:
            judge.deliver(trajectory.sibling, trajectory.segments[n].candidate)
        decided = [(t, judge.judge(t.sibling, t.segments[n].candidate, 0)) for t in present]
        for trajectory, judgement in decided:
            judge.commit(trajectory.sibling, trajectory.segments[n].candidate, judgement)
            judgements.append(judgement)
    return judgements


def _chain(share_above: Sequence[float]) -> float:
    """Expected erasures of a segment when attempt e is erased with probability ``share_above[e]``."""
    expected, reached = 0.0, 1.0
    for share in share_above:
        reached *= share
        expected += reached
    return expected


def assess(groups: Sequence[Group], erasure: ErasureConfig) -> Setting:
    """What ``erasure`` would have done to these plain rollouts. Its baseline must be the group's or static."""
    from e3rl.equations.threshold import attempt_penalty

    judgements = [j for group in groups for j in _replayed(group, erasure)]
    pairs = [(j.uncertainty.total, j.threshold.total) for j in judgements]
    penalties = [float(attempt_penalty(e, erasure.eta, erasure.delta)) for e in range(erasure.max_erasures)]
    above = [sum(u > theta * penalty for u, theta in pairs) for penalty in penalties]
    first = above[0] / len(pairs) if above else 0.0
    independent = _chain([count / len(pairs) for count in above])
    hopeless = sum(above) / len(pairs)  # every retry repeats its U: only the rising threshold ends the chain
    return Setting(erasure, first, independent, hopeless)


def grid(base: ErasureConfig, kappa0s: Iterable[float], perturbation_weights: Iterable[float]) -> list[ErasureConfig]:
    """Settings to compare: every kappa_0 with every weight of the perturbation that leaves U a term. A quantile says itself how
    much is erased, and a static baseline has no kappa_0: with these there is nothing to compare."""
    if base.baseline in ("quantile", "static"):
        return [base]
    others = base.base_weight + base.gradient_weight + base.extremum_weight
    return [
        replace(base, kappa0=kappa0, perturbation_weight=weight)
        for weight in perturbation_weights
        for kappa0 in kappa0s
        if others + weight > 0
    ]


def recommend(settings: Sequence[Setting], target: float) -> Setting:
    """The setting whose share of erased first candidates is nearest to ``target``; of equals, the stricter one."""
    return min(settings, key=lambda s: (abs(s.erase_share - target), -s.erasure.kappa0))
