"""Calibration of a model, whole: sample, compare settings, check the recommended one for real, save what decoding needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from e3rl.config import Config, ErasureConfig
from e3rl.data.loading import load_problems
from e3rl.data.prompts import render_prompts
from e3rl.engine.build import build_engine
from e3rl.errors import UserError
from e3rl.models import Policy, resolve_model_path
from e3rl.rollout.calibration import Setting, assess, grid, recommend, strictness
from e3rl.rollout.driver import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.statistics import ReferenceStatistics, measured_by
from e3rl.rollout.stats import RolloutStats, summarise
from e3rl.types import Group


@dataclass(frozen=True)
class Calibration:
    """The grid, the recommended settings, what they really did, and the statistics that belong to them."""

    settings: tuple[Setting, ...]
    config: Config
    recommended: Setting
    measured: RolloutStats
    reference: ReferenceStatistics


def calibrate(
    policy: Policy, data: str, config: Config, *, prompts: int, target: float, kappa0s: Sequence[float]
) -> Calibration:
    """Compare settings on plain rollouts, then roll out once with the recommended one and measure it.

    Where thresholds are to come from reference statistics, siblings stand in for them: those are what is being made.
    """
    asked = config.erasure.baseline
    if asked == "reference":
        config = replace(config, erasure=replace(config.erasure, baseline="group"))
    if config.rollout.num_generations < config.erasure.min_siblings:
        raise UserError("calibration compares siblings: rollout.num_generations must be at least erasure.min_siblings")
    settings = grid(config.erasure, kappa0s, sorted({0.0, 1.0, config.erasure.perturbation_weight}))
    mine = [s for s in settings if s.perturbation_weight == config.erasure.perturbation_weight]
    if not mine:
        raise UserError(
            "the four weights of [erasure] are all 0, so U has no term to calibrate: set one of them above 0"
        )
    problems = load_problems(data, config=config.data, split="train")[:prompts]
    limit = config.rollout.completion_limit
    rendered = render_prompts(
        problems, policy.tokenizer, config.data, context_limit=policy.context_length, completion_limit=limit
    )
    engine = build_engine(config.rollout, policy.model, policy.eos_ids, max(len(p.ids) for p in rendered))

    def roll_out(chosen: Config) -> list[Group]:
        return list(run_groups(engine, rendered, GroupSettings(chosen.rollout, chosen.erasure, chosen.run.seed)))

    plain = roll_out(replace(config, rollout=replace(config.rollout, erase=False)))
    assessed = [assess(plain, erasure) for erasure in settings]
    best = recommend([s for s in assessed if s.erasure in mine], target)
    chosen = replace(config, erasure=best.erasure, rollout=replace(config.rollout, erase=True))
    real = roll_out(chosen)
    reference = ReferenceStatistics(measured_by(chosen.rollout, chosen.erasure)).including(real)
    chosen = replace(chosen, erasure=replace(chosen.erasure, baseline=asked))
    return Calibration(tuple(assessed), chosen, best, summarise(real), reference)


def calibration_table(result: Calibration) -> Table:
    """The grid with its estimates, the recommended row marked and followed by what it really did."""
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
    table.caption_justify = "left"
    return table


def _threshold(erasure: ErasureConfig) -> str:
    """The setting that says how much is erased."""
    name = strictness(erasure)
    return f"{name} = {getattr(erasure, name):g}"


def calibration_directory(model_path: str, output: Path | None) -> Path:
    """Where statistics and settings will go: beside the model, or into ``output``."""
    directory = output or Path(resolve_model_path(model_path))
    if output is None and not directory.is_dir():
        raise UserError(f"'{model_path}' is no local directory: say where to save with --output DIR")
    if directory.is_file():
        raise UserError(f"--output {directory} is a file; it names the directory for statistics and settings")
    return directory
