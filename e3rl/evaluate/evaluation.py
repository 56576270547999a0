"""Held-out evaluation: every problem is sampled k times, plain or with erasable decoding, graded and summarised.

Training, `e3rl eval`, `e3rl diagnose` and `e3rl reproduce` draw through `draw`, in the rounds that `round_sizes` names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from e3rl.config import Config
from e3rl.engine.protocol import Engine
from e3rl.evaluate.figures import MEAN, correct_table, figures, mean_figures
from e3rl.evaluate.samples import Sample, graded
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.batches import run_jobs
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.statistics import CalibrationStatistics
from e3rl.types import Group, Prompt, Trajectory

T = TypeVar("T")

SEED_OFFSET = 1_000_003
"""Name of evaluation's own stream of random numbers, the same before and after training."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation. ``correct_PK`` counts a missing reward as wrong. ``trajectories_PK`` is empty unless asked for."""

    mode: str  # "plain" or "erasable"
    samples_PK: tuple[tuple[Sample, ...], ...]
    trajectories_PK: tuple[tuple[Trajectory, ...], ...] = ()

    @property
    def correct_PK(self) -> np.ndarray:
        return correct_table(self.samples_PK)

    def record(self) -> dict[str, Any]:
        """The figures in the form of evaluations.jsonl and summary.json."""
        return figures(self.mode, self.samples_PK)


def even_sizes(samples: int, most: int, least: int = 1) -> list[int]:
    """``samples`` in as few parts of at most ``most`` as possible, sizes differing by one at most, larger ones first.

    No part is below ``least`` if there are enough samples; some parts may then be larger than ``most``.
    """
    count = max(1, min(-(-samples // most), samples // least))
    return [samples // count + (i < samples % count) for i in range(count)]


def round_sizes(config: Config, samples: int | None = None) -> list[int]:
    """Sizes of the rounds in which a problem's samples are drawn: as many at a time as there are siblings in training.

    A round of erasable decoding is a group: its samples set each other's thresholds, so it holds at least
    erasure.min_siblings. If training has fewer siblings than that, all samples are one group. Rounds are not larger than
    rollout.cache_rows. Plain samples do not depend on rounds.
    """
    rollout, wanted = config.rollout, config.eval.num_samples if samples is None else samples
    least = config.erasure.min_siblings
    siblings = rollout.num_generations if rollout.num_generations >= least else wanted
    most = max(1, min(siblings, rollout.cache_rows or 2 * rollout.max_rows))
    return even_sizes(wanted, most, min(least, most))


def evaluation_settings(config: Config, *, erase: bool) -> Config:
    """The run's settings with evaluation's sampling instead of training's, and the siblings of the smallest round."""
    chosen = config.eval
    rollout = replace(
        config.rollout,
        erase=erase,
        num_generations=round_sizes(config)[-1],
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        top_k=chosen.top_k,
    )
    return replace(config, rollout=rollout)


Draws = Callable[[Iterable[tuple[Prompt, GroupSettings]]], Iterator[tuple[int, Group]]]
"""Used instead of an engine: draws groups in other processes, each with the number of its first sample."""


def draw(
    engine: Engine | Draws,
    wanted: Iterable[tuple[Prompt, int, int]],
    config: Config,
    *,
    erase: bool,
    calibration: CalibrationStatistics | None = None,
) -> Iterator[tuple[int, Group]]:
    """Takes (prompt, first sample, size); yields (first sample, group) as groups finish.

    A sample's random draws are named by its number, so plain samples do not depend on the division into rounds.
    """
    chosen, seed = evaluation_settings(config, erase=erase), config.run.seed + SEED_OFFSET

    def settings(first: int, size: int) -> GroupSettings:
        rollout = replace(chosen.rollout, num_generations=size)
        return GroupSettings(rollout, chosen.erasure, seed, calibration=calibration, first_sibling=first)

    settings(0, chosen.rollout.num_generations).check()
    jobs = ((prompt, settings(first, size)) for prompt, first, size in wanted)
    if callable(engine):
        yield from engine(jobs)
        return
    for job in run_jobs(engine, jobs, round_sizes(config)[0]):
        yield job.settings.first_sibling, job.result()


class Peers(Protocol):
    """Processes that draw one evaluation together (`e3rl.cluster.ranks.Ranks`)."""

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of the items."""

    def gather(self, value: T) -> list[T]:
        """Returns the values of all processes, in every process."""


def evaluate(
    engine: Engine | Draws,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    tokenizer: Any,
    config: Config,
    *,
    erase: bool,
    calibration: CalibrationStatistics | None = None,
    keep_trajectories: bool = False,
    peers: Peers | None = None,
) -> Evaluation:
    """Sample every prompt ``eval.num_samples`` times and grade the answers with the run's first reward function.

    Each of the ``peers`` draws and grades a share, and all have the whole result at the end.
    Texts are not kept, nor trajectories unless asked for: many long samples would not fit into memory.
    """
    mode, sizes = "erasable" if erase else "plain", round_sizes(config)
    firsts = list(itertools.accumulate(sizes[:-1], initial=0))
    wanted = [(prompt, first, size) for first, size in zip(firsts, sizes, strict=True) for prompt in prompts]
    samples: dict[tuple[str, int], tuple[Sample, ...]] = {}
    kept: dict[tuple[str, int], tuple[Trajectory, ...]] = {}
    mine = peers.share(wanted) if peers else wanted
    for first, group in draw(engine, mine, config, erase=erase, calibration=calibration):
        done = graded(group, scorer, tokenizer, mode=mode, round=firsts.index(first), first=first)
        samples[group.prompt.problem.id, first] = tuple(replace(sample, pred="") for sample in done)
        kept[group.prompt.problem.id, first] = group.trajectories if keep_trajectories else ()
    for drawn in peers.gather(samples) if peers else ():
        samples |= drawn

    def rows(parts: Mapping[tuple[str, int], tuple[Any, ...]]) -> tuple[tuple[Any, ...], ...]:
        return tuple(tuple(x for first in firsts for x in parts[p.problem.id, first]) for p in prompts)

    return Evaluation(mode, rows(samples), rows(kept) if keep_trajectories else ())


def held_out_records(
    engine: Engine | Draws,
    held_out: Mapping[str, Sequence[Prompt]],
    scorer: Scorer,
    tokenizer: Any,
    config: Config,
    *,
    calibration: CalibrationStatistics | None,
    done: Sequence[Mapping[str, Any]] = (),
    peers: Peers | None = None,
) -> Iterator[dict[str, Any]]:
    """The figures of every source, plain and (if asked for) erasable, except those that ``done`` already has.

    With several sources, ``data`` names each, and their mean follows.
    """
    several = len(held_out) > 1
    for mode in ("plain", "erasable") if config.eval.erasable else ("plain",):
        there = {r.get("data", ""): dict(r) for r in done if r["mode"] == mode}
        for source, prompts in held_out.items():
            name = source if several else ""
            if name in there:
                continue
            found = evaluate(
                engine,
                prompts,
                scorer,
                tokenizer,
                config,
                erase=mode == "erasable",
                calibration=calibration,
                peers=peers,
            ).record()
            there[name] = {**found, "data": name} if several else found
            yield there[name]
        if several and MEAN not in there:
            yield {**mean_figures([there[source] for source in held_out]), "data": MEAN}
