"""Calibration: how often a setting would erase for a model and prompts, and the statistics that decoding needs.

One set of unjudged rollouts serves the whole grid: the production judge is replayed over it with each setting. The
recommended one is then rolled out for real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.table import Table

from e3rl.config import Config, ErasureConfig
from e3rl.data.loading import load_problems, spread
from e3rl.data.prompts import render_prompts
from e3rl.engine.build import build_engine
from e3rl.equations.threshold import attempt_penalty
from e3rl.errors import UserError
from e3rl.models import Policy, resolve_model_path
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.judge import GroupJudge
from e3rl.rollout.statistics import CalibrationStatistics, measured_by
from e3rl.rollout.stats import RolloutStats, summarise
from e3rl.types import TERMS, Group, Judgement


@dataclass(frozen=True)
class Setting:
    """One point of the grid and its estimates. ``r_low`` and ``r_high`` bound the regeneration ratio: with retries as certain as
    a sibling's draw, and with retries as uncertain as what they replace."""

    erasure: ErasureConfig
    erase_share: float
    r_low: float
    r_high: float


def _replayed(group: Group, erasure: ErasureConfig) -> list[Judgement]:
    """Judgements of every segment of a plain group, as if it had been generated under ``erasure`` without budget."""
    unspent = replace(erasure, max_erasures=0)
    judge = GroupJudge(len(group.trajectories), unspent)
    judgements: list[Judgement] = []
    longest = max(len(t.drawn_segments) for t in group.trajectories)
    for n in range(longest):
        present = [t for t in group.trajectories if len(t.drawn_segments) > n]
        for trajectory in group.trajectories:
            if len(trajectory.drawn_segments) == n:
                judge.finish(trajectory.sibling)
        for trajectory in present:
            judge.deliver(trajectory.sibling, trajectory.drawn_segments[n].candidate)
        decided = [(t, judge.judge(t.sibling, t.drawn_segments[n].candidate, 0)) for t in present]
        for trajectory, judgement in decided:
            judge.commit(trajectory.sibling, trajectory.drawn_segments[n].candidate, judgement)
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
    judgements = [j for group in groups for j in _replayed(group, erasure)]
    pairs = [(j.uncertainty.total, j.threshold.total) for j in judgements]
    penalties = [float(attempt_penalty(e, erasure.eta, erasure.delta)) for e in range(erasure.max_erasures)]
    above = [sum(u > theta * penalty for u, theta in pairs) for penalty in penalties]
    first = above[0] / len(pairs) if above else 0.0
    independent = _chain([count / len(pairs) for count in above])
    hopeless = sum(above) / len(pairs)  # every retry repeats its U: only the rising threshold ends the chain
    return Setting(erasure, first, independent, hopeless)


def static_baseline(groups: Sequence[Group], erasure: ErasureConfig, target: float) -> float:
    """The static B_n that U exceeds in a share ``target`` of these plain rollouts' segments."""
    fixed = replace(erasure, baseline="static", static_baseline=1.0)
    totals = [j.uncertainty.total for group in groups for j in _replayed(group, fixed)]
    return float(np.quantile(totals, 1 - target))


def grid(base: ErasureConfig, kappa0s: Iterable[float], perturbation_weights: Iterable[float]) -> list[ErasureConfig]:
    """Settings to compare: every kappa_0 with every weight of the perturbation that leaves U a term. The baselines
    'quantile', 'reservation' and 'static' have no kappa_0, so there is nothing to compare."""
    if base.strictness != "kappa0":
        return [base]
    others = sum(getattr(base, f"{term}_weight") for term in TERMS if term != "perturbation")
    return [
        replace(base, kappa0=kappa0, perturbation_weight=weight)
        for weight in perturbation_weights
        for kappa0 in kappa0s
        if others + weight > 0
    ]


def recommend(settings: Sequence[Setting], target: float) -> Setting:
    """The setting whose share of erased first candidates is nearest to ``target``; of equals, the stricter one."""
    return min(settings, key=lambda s: (abs(s.erase_share - target), -s.erasure.kappa0))


@dataclass(frozen=True)
class Calibration:
    """The grid, the recommended settings, what they really did, and the statistics that belong to them."""

    settings: tuple[Setting, ...]
    config: Config
    recommended: Setting
    measured: RolloutStats
    calibration: CalibrationStatistics
    levels: tuple[str, ...] = ()
    """What shares of a token's −log p and entropy are above what: for rollout.boundary_level."""


def calibrate(
    policy: Policy,
    data: str,
    config: Config,
    *,
    prompts: int,
    target: float,
    kappa0s: Sequence[float],
    tell: Callable[[str, int, int], object] = lambda activity, done, of: None,
) -> Calibration:
    """Compare settings on plain rollouts, then roll out once with the recommended one and measure it. ``tell`` hears how far
    that is."""
    asked = config.erasure.baseline
    config, settings = compared_settings(config, kappa0s)
    mine = [s for s in settings if s.perturbation_weight == config.erasure.perturbation_weight]
    problems = spread(load_problems(data, config=config.data, split="train"), prompts)
    limit = config.rollout.completion_limit
    rendered = render_prompts(
        problems, policy.tokenizer, config.data, context_limit=policy.context_length, completion_limit=limit
    )
    engine = build_engine(config.rollout, policy.model, policy.eos_ids, max(len(p.ids) for p in rendered))

    def roll_out(activity: str, chosen: Config) -> list[Group]:
        groups = []
        for group in run_groups(engine, rendered, GroupSettings(chosen.rollout, chosen.erasure, chosen.run.seed)):
            groups.append(group)
            tell(activity, len(groups), len(rendered))
        return groups

    plain = roll_out("plain rollouts", replace(config, rollout=replace(config.rollout, erase=False)))
    assessed = [assess(plain, erasure) for erasure in settings]
    best = recommend([s for s in assessed if s.erasure in mine], target)
    chosen = replace(config, erasure=best.erasure, rollout=replace(config.rollout, erase=True))
    real = roll_out("with the recommended setting", chosen)
    calibration = CalibrationStatistics(measured_by(chosen.rollout, chosen.erasure)).including(real)
    height = config.erasure.static_baseline if asked == "static" else static_baseline(plain, best.erasure, target)
    chosen = replace(chosen, erasure=replace(chosen.erasure, baseline=asked, static_baseline=height))
    return Calibration(tuple(assessed), chosen, best, summarise(real), calibration, boundary_levels(plain))


def boundary_levels(groups: Sequence[Group]) -> tuple[str, ...]:
    """A line each for rollout.boundary = 'surprise' and 'entropy': the quantiles of plain rollouts' tokens."""
    drawn = [s.candidate for g in groups for t in g.trajectories for s in t.drawn_segments]
    measures = {"surprise": [-c.logprobs for c in drawn], "entropy": [c.entropies for c in drawn]}
    shares = (0.2, 0.1, 0.05)
    found = {
        name: np.quantile(np.concatenate(values), [1 - share for share in shares]) for name, values in measures.items()
    }
    return tuple(
        f"{name}: " + ", ".join(f"{share:.0%} above {level:.3g}" for share, level in zip(shares, levels, strict=True))
        for name, levels in found.items()
    )


def compared_settings(config: Config, kappa0s: Sequence[float]) -> tuple[Config, list[ErasureConfig]]:
    """The config that a calibration samples by, and the erasure settings that it compares; UserError where there is none.

    Where thresholds are to come from calibration statistics, siblings stand in for them, since those are what is being
    made.
    """
    if config.erasure.baseline == "reference":
        config = replace(config, erasure=replace(config.erasure, baseline="group"))
    if config.rollout.num_generations < config.erasure.min_siblings:
        raise UserError("calibration compares siblings: rollout.num_generations must be at least erasure.min_siblings")
    settings = grid(config.erasure, kappa0s, sorted({0.0, 1.0, config.erasure.perturbation_weight}))
    if not any(s.perturbation_weight == config.erasure.perturbation_weight for s in settings):
        raise UserError("the weights of [erasure] are all 0, so U has no term to calibrate: set one of them above 0")
    return config, settings


def calibration_table(result: Calibration) -> Table:
    """The grid with its estimates, the recommended row marked, and below it what that setting did when rolled out."""
    table = Table(title="Erasure settings, estimated from plain rollouts", title_justify="left")
    for name in ("", "method", "threshold", "weight of ε", "segments erased", "r at best", "r at worst"):
        table.add_column(
            name, justify="left" if name in ("", "method") else "right", no_wrap=name in ("method", "threshold")
        )
    for s in result.settings:
        chosen = s is result.recommended
        weight = s.erasure.perturbation_weight
        table.add_row(
            "→" if chosen else "",
            "E³RL+ε" if weight else "E³RL",
            _threshold(s.erasure),
            f"{weight:g}",
            f"{s.erase_share:.3f}",
            f"{s.r_low:.3f}",
            f"{s.r_high:.3f}",
            style="bold green" if chosen else None,
        )
    stats = result.measured
    table.caption = (
        f"Recommended: erasure.{_threshold(result.recommended.erasure)}. Rolled out for real it erased "
        f"{stats.erase_rate:.3f} of all candidates, r = {stats.r:.3f}, forced accepts {stats.forced_rate:.3f}."
    )
    if height := result.config.erasure.static_baseline:
        table.caption += f" One threshold for all groups: static_baseline = {height:.3g}."
    if result.levels:
        table.caption += f" Tokens, for rollout.boundary_level: {'; '.join(result.levels)}."
    table.caption_justify = "left"
    return table


def _threshold(erasure: ErasureConfig) -> str:
    """The setting that says how much is erased."""
    name = erasure.strictness
    return f"{name} = {getattr(erasure, name):g}"


def calibration_directory(model_path: str, output: Path | None) -> Path:
    """Where statistics and settings will go: beside the model, or into ``output``."""
    directory = output or Path(resolve_model_path(model_path))
    if output is None and not directory.is_dir():
        raise UserError(f"'{model_path}' is no local directory: say where to save with --output DIR")
    if output is None and Path(__file__).parents[1] in directory.resolve().parents:
        raise UserError(
            f"'{model_path}' is part of e3rl, and its own settings stay: say where to save with --output DIR"
        )
    if directory.is_file():
        raise UserError(f"--output {directory} is a file; it names the directory for statistics and settings")
    return directory
