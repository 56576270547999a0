"""An evaluation that streams to disk: the plan of its samples, the drawing of one shard, and the figures of the whole."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from e3rl.config import Config
from e3rl.engine.build import build_engine
from e3rl.engine.protocol import Engine
from e3rl.evaluate.evaluation import draw, round_sizes
from e3rl.evaluate.figures import equal_budget, equal_samples, figures, samples_for
from e3rl.evaluate.samples import Sample, by_problem, graded
from e3rl.evaluate.store import FIGURES, SampleStore, Shard, Unit
from e3rl.files import write_json
from e3rl.models import Policy
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.statistics import CalibrationStatistics
from e3rl.types import Prompt

Progress = Callable[[Sequence[Sample]], None]


@dataclass(frozen=True)
class SamplingPlan:
    """``eval.num_samples`` of each problem: plain, and with ``erase`` also erasable."""

    problems: tuple[str, ...]
    config: Config
    erase: bool

    @property
    def samples(self) -> int:
        return self.config.eval.num_samples

    def units(self, mode: str, samples: int, *, round: int = 0, first: int = 0) -> list[Unit]:
        """The rounds that make ``samples`` of every problem, from round and sample number on."""
        sizes = round_sizes(self.config, samples)
        starts = itertools.accumulate([first, *sizes[:-1]])
        return [
            Unit(mode, round + i, problem, start, size)
            for i, (start, size) in enumerate(zip(starts, sizes, strict=True))
            for problem in self.problems
        ]

    def wanted(self) -> list[Unit]:
        """The groups that are known before sampling."""
        return [u for mode in self.modes for u in self.units(mode, self.samples)]

    @property
    def modes(self) -> tuple[str, ...]:
        return ("plain", "erasable") if self.erase else ("plain",)

    def more_plain(self, table: dict[str, list[list[Sample]]]) -> list[Unit]:
        """The extra plain samples for the tokens that the erasable ones used."""
        if not self.erase:
            return []
        extra = samples_for(equal_samples(table["plain"], table["erasable"])) - self.samples
        return self.units("plain", extra, round=len(round_sizes(self.config)), first=self.samples) if extra > 0 else []


def tables(plan: SamplingPlan, samples: Sequence[Sample]) -> dict[str, list[list[Sample]]]:
    """The first ``plan.samples`` samples of each problem by mode."""
    kept = [s for s in samples if s.sample < plan.samples]
    return {mode: by_problem([s for s in kept if s.mode == mode], plan.problems) for mode in plan.modes}


def missing(plan: SamplingPlan, store: SampleStore) -> list[Unit]:
    """The units to sample next: first the planned groups; when all are complete, those of the equal budget."""
    return store.missing(plan.wanted()) or store.missing(plan.more_plain(tables(plan, store.samples())))


@dataclass(frozen=True)
class Sampler:
    """Turns units into graded samples."""

    policy: Policy
    prompts: Sequence[Prompt]
    config: Config
    scorer: Scorer
    calibration: CalibrationStatistics | None
    deadline: float = math.inf

    def run(self, plan: SamplingPlan, store: SampleStore, shard: Shard, progress: Progress) -> bool:
        """Sample all missing units of the shard; False if the deadline came first. No group is left incomplete."""
        engine: Engine | None = None
        with store.writer(shard) as writer:
            while units := shard.take(missing(plan, store), plan.problems):
                if time.monotonic() >= self.deadline:
                    return False
                engine = engine or self._engine()
                for samples in self._sample(engine, units):
                    writer.write(samples)
                    progress(samples)
        return True

    def _engine(self) -> Engine:
        longest = max(len(p.ids) for p in self.prompts)
        return build_engine(self.config.rollout, self.policy.model, self.policy.eos_ids, longest)

    def _sample(self, engine: Engine, units: Sequence[Unit]) -> Iterator[tuple[Sample, ...]]:
        """The units' samples as they finish; units of one mode are decoded together."""
        prompts = {p.problem.id: p for p in self.prompts}
        for mode, batch in itertools.groupby(units, key=lambda u: u.mode):
            chosen = list(batch)
            rounds = {unit.first: unit.round for unit in chosen}
            in_time = itertools.takewhile(lambda _: time.monotonic() < self.deadline, chosen)
            wanted = ((prompts[unit.problem], unit.first, unit.size) for unit in in_time)
            drawn = draw(engine, wanted, self.config, erase=mode == "erasable", calibration=self.calibration)
            for first, group in drawn:
                yield graded(group, self.scorer, self.policy.tokenizer, mode=mode, round=rounds[first], first=first)


def conclude(plan: SamplingPlan, store: SampleStore, facts: dict[str, Any], ks: Sequence[int] = ()) -> dict[str, Any]:
    """The figures of a complete directory, written there with the table of samples. ``facts`` come first."""
    samples = store.samples()
    table = tables(plan, samples)
    found: dict[str, Any] = {**facts, **{mode: figures(mode, table[mode], ks) for mode in plan.modes}}
    if plan.erase:
        plain = by_problem([s for s in samples if s.mode == "plain"], plan.problems)
        budget = equal_samples(table["plain"], table["erasable"])
        found["equal_budget"] = equal_budget(plain, table["erasable"], budget)
    write_json(store.path / FIGURES, found)
    store.write_table(samples)
    return found
