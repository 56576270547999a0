"""Small scripted worlds in which a test can say exactly how uncertain every candidate is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from e3rl.config import ErasureConfig, RolloutConfig
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.moments import Distribution, Moments
from e3rl.rollout.orders import Event
from e3rl.rollout.statistics import CalibrationStatistics, measured_by
from e3rl.testing.scripted import Script, Scripted, ScriptedEngine
from e3rl.types import Draw, Group, Problem, Prompt, Trajectory, Verdict

Where = tuple[str, int, int, int]

MEAN_ONLY = ErasureConfig(
    baseline="static",
    static_baseline=1.0,
    gradient_weight=0.0,
    extremum_weight=0.0,
    smoothing_window=0,
    eta=0.0,
    rho=0.0,
    max_erasures=2,
)
"""U is a candidate's mean entropy and Theta is 1."""

PLAIN_GROUP = ErasureConfig(
    gradient_weight=0.0, extremum_weight=0.0, smoothing_window=0, eta=0.0, rho=0.0, max_erasures=2
)
"""U is a candidate's mean entropy and Theta is mean + standard deviation of the siblings' first ones."""


def prompt(name: str = "p") -> Prompt:
    """A prompt of three tokens."""
    return Prompt(Problem(name, name), (1, 2, 3))


def rollout(**settings: Any) -> RolloutConfig:
    """Two siblings, three segments of two tokens, unless said otherwise."""
    return RolloutConfig(**{"num_generations": 2, "segment_length": 2, "max_segments": 3, **settings})


def levels(
    table: Mapping[Where, float | tuple[float, ...]], ends: Iterable[Where] = (), default: float = 0.5
) -> Callable[[Draw, int], Scripted]:
    """A script by entropy level: every token of a candidate has its entry's entropy, or its own of a tuple."""
    ending = set(ends)

    def script(draw: Draw, tokens: int) -> Scripted:
        where = (draw.prompt_id, draw.sibling, draw.segment, draw.attempt)
        level = table.get(where, default)
        return Scripted(level if isinstance(level, tuple) else (level,) * tokens, ended=where in ending)

    return script


def roll(
    script: Script,
    erasure: ErasureConfig = MEAN_ONLY,
    config: RolloutConfig | None = None,
    prompts: Iterable[str] = ("p",),
    engine: Mapping[str, Any] | None = None,
    observe: Callable[[Event], None] | None = None,
    **outside: Any,
) -> tuple[dict[str, Group], ScriptedEngine]:
    """Roll the prompts out; the groups by prompt, and the engine with its record."""
    scripted = ScriptedEngine(script, **(engine or {}))
    settings = GroupSettings(config or rollout(), erasure, seed=7, step=3, policy_version=5, **outside)
    groups = list(run_groups(scripted, [prompt(p) for p in prompts], settings, observe=observe))
    return {g.prompt.problem.id: g for g in groups}, scripted


ALONE = rollout(num_generations=1)


def only(groups: Mapping[str, Group], sibling: int = 0) -> Trajectory:
    """A trajectory of the only group."""
    (group,) = groups.values()
    return group.trajectories[sibling]


def verdicts(trajectory: Trajectory) -> list[tuple[int, Verdict]]:
    """(attempt, verdict) of each committed segment."""
    judgements = [s.judgement for s in trajectory.segments if s.judgement is not None]
    return [(j.attempt, j.verdict) for j in judgements]


def calibration_of(config: RolloutConfig, erasure: ErasureConfig, *segments: Distribution) -> CalibrationStatistics:
    """Calibration statistics that fit the settings; token entropies have mean 1 and standard deviation 1."""
    return CalibrationStatistics(measured_by(config, erasure), segments, Moments.of([0.0, 2.0]))
