"""The rollouts of a diagnosis: plain first samples, and retries from prefixes of these samples.

A retry continues to the end of its response, since only a complete response can be graded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from e3rl.config import Config
from e3rl.diagnose.labels import labels, segment_ends
from e3rl.diagnose.signals import measure
from e3rl.engine.protocol import Engine
from e3rl.equations.uncertainty import segment_entropy
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.moments import Moments
from e3rl.types import Group, Prompt, Segment, Trajectory


@dataclass(frozen=True)
class Observation:
    """One judged segment: its signals, and whether it is wrong. Draws with the same ``prefix`` are siblings."""

    problem: str
    prefix: str
    signals: dict[str, float]
    wrong: bool


@dataclass(frozen=True)
class Fork:
    """A redrawn segment of a first sample: whether its response was right, how often the retries were, and the tokens that one
    more draw costs: the segment's, and the rest of a retry less that of the first."""

    problem: str
    signals: dict[str, float]
    first_right: bool
    retries_right: float
    extra_tokens: float = 0.0


@dataclass(frozen=True)
class First:
    """A plain sample with everything known about it."""

    trajectory: Trajectory
    right: bool
    wrong_N: tuple[bool, ...]  # may be shorter than the segments: what follows the first wrong one can't be judged
    signals_N: tuple[dict[str, float], ...]
    entropies: Moments  # of its group: what a peak is compared with, here and in what is drawn again


Tell = Callable[[str, int, int], object]
"""Progress callback: activity, amount done, total (0: unknown)."""


def roll_out(
    engine: Engine, prompts: Sequence[Prompt], config: Config, tell: Tell = lambda activity, done, of: None
) -> list[Group]:
    """Plain rollouts, in the prompts' order."""
    settings = GroupSettings(replace(config.rollout, erase=False), config.erasure, config.run.seed)
    found = {}
    for group in run_groups(engine, prompts, settings):
        found[group.prompt.problem.id] = group
        tell("samples", len(found), len(prompts))
    return [found[p.problem.id] for p in prompts]


def grade(scorer: Scorer, trajectories: Sequence[Trajectory], texts: Sequence[str]) -> list[bool | None]:
    """Whether each response's final answer is right, by the first reward function; None where it can't be graded."""
    return [reward.right for reward in scorer.score(trajectories, texts)]


def segment_signals(
    segments: Sequence[Segment], earlier: Sequence[Segment], reference: Moments
) -> Iterator[dict[str, float]]:
    """Signals of consecutive segments that follow the ``earlier`` ones."""
    means = [_mean_entropy(s) for s in (*earlier, *segments)]
    for n, segment in enumerate(segments):
        following = segments[n + 1].candidate if n + 1 < len(segments) else None
        yield measure(segment.candidate, means[: len(earlier) + n], reference, following)


def _mean_entropy(segment: Segment) -> float:
    from torch import tensor

    return float(segment_entropy(tensor(segment.candidate.entropies)))


def group_entropies(group: Group) -> Moments:
    """Moments of the token entropies of all segments of the group."""
    moments = Moments()
    for trajectory in group.trajectories:
        moments = moments.merged(Moments.of(trajectory.entropies))
    return moments


def firsts(
    groups: Sequence[Group], scorer: Scorer, tokenizer: Any, by_steps: bool
) -> tuple[list[First], list[str | None]]:
    """The graded samples of plain groups, and for every sample why it could not be graded (None if it could)."""
    trajectories = [t for g in groups for t in g.trajectories]
    references = [group_entropies(g) for g in groups for _ in g.trajectories]
    texts = [tokenizer.decode(t.ids.tolist(), skip_special_tokens=True) for t in trajectories]
    rewards = scorer.score(trajectories, texts)
    rights = [reward.right for reward in rewards]
    found = []
    for trajectory, reference, text, right in zip(trajectories, references, texts, rights, strict=True):
        if right is None:
            continue
        ends = segment_ends(trajectory.segments, tokenizer)
        wrong_N = labels(trajectory.prompt.problem, text, ends, right, by_steps)
        signals_N = tuple(segment_signals(trajectory.segments, (), reference))
        found.append(First(trajectory, right, tuple(wrong_N), signals_N, reference))
    faults = [r.error or "no reason given" for r in rewards]
    return found, [fault if right is None else None for fault, right in zip(faults, rights, strict=True)]


def choose_forks(samples: Sequence[First], seed: int) -> list[tuple[First, int]]:
    """One random judged segment of every sample."""
    rng = Random(f"forks/{seed}")
    return [(first, rng.randrange(len(first.wrong_N))) for first in samples]


def prefix_prompt(first: First, n: int) -> Prompt:
    trajectory = first.trajectory
    problem = trajectory.prompt.problem
    committed = tuple(i for s in trajectory.segments[:n] for i in s.candidate.ids.tolist())
    return Prompt(replace(problem, id=f"{problem.id}/{trajectory.sibling}/{n}"), trajectory.prompt.ids + committed)


def retry(
    engine: Engine,
    scorer: Scorer,
    tokenizer: Any,
    config: Config,
    chosen: Sequence[tuple[First, int]],
    retries: int,
    by_steps: bool,
    tell: Tell = lambda activity, done, of: None,
) -> tuple[list[Fork], list[Observation]]:
    """Draw the chosen segments again ``retries`` times, to the end of the response.

    The observations are the first segments of all draws from each prefix, the original's included.
    """
    forks: list[Fork] = []
    observations: list[Observation] = []
    for n in sorted({n for _, n in chosen}):
        here = [first for first, at in chosen if at == n]
        rest = config.rollout.completion_limit - n * config.rollout.segment_length
        rollout = replace(config.rollout, num_generations=retries, max_completion_length=rest)
        groups = roll_out(engine, [prefix_prompt(f, n) for f in here], replace(config, rollout=rollout))
        tell("retries", len(forks) + len(here), len(chosen))
        for first, group in zip(here, groups, strict=True):
            fork, seen = _compare(scorer, tokenizer, first, n, group, by_steps)
            forks.append(fork)
            observations += seen
    return forks, observations


def _compare(
    scorer: Scorer, tokenizer: Any, first: First, n: int, group: Group, by_steps: bool
) -> tuple[Fork, list[Observation]]:
    """The comparison at one fork, and the observations of its draws."""
    original, problem = first.trajectory, first.trajectory.prompt.problem
    earlier = original.segments[:n]
    prefix = [i for s in earlier for i in s.candidate.ids.tolist()]
    texts = [tokenizer.decode([*prefix, *t.ids.tolist()], skip_special_tokens=True) for t in group.trajectories]
    rights = [right or False for right in grade(scorer, group.trajectories, texts)]
    key = group.prompt.problem.id
    seen = [Observation(problem.id, key, first.signals_N[n], first.wrong_N[n])]
    for trajectory, text, right in zip(group.trajectories, texts, rights, strict=True):
        ends = segment_ends([*earlier, *trajectory.segments], tokenizer)
        wrong_N = labels(problem, text, ends, right, by_steps)
        if len(wrong_N) > n:
            signals = next(segment_signals(trajectory.segments, earlier, first.entropies))
            seen.append(Observation(problem.id, key, signals, wrong_N[n]))
    rest = sum(s.candidate.ids.size for s in original.segments[n:])
    redrawn = sum(t.committed_tokens for t in group.trajectories) / len(group.trajectories)
    extra = original.segments[n].candidate.ids.size + redrawn - rest
    fork = Fork(problem.id, first.signals_N[n], first.right, sum(rights) / len(rights), extra)
    return fork, seen
