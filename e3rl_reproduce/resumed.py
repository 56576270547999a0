"""For research: groups of which some responses begin with a part of another. Baselines that go back, or give up, without erasing.

A row names what makes its groups (`e3rl_reproduce.study.Row.rollouts`). *Branches*: half of a group are whole responses; each of
the others begins in one of them, cut at random (`branched`), or in a wrong one, cut before its most suspicious segment (`reset`,
after DEEP-GRPO and SRPO). *Pruning* (`pruned`, after ARRoL): twice as many responses are generated to half their segments, and
the less suspicious half of them goes on. Suspicion is U, of any metric; nothing is erased.

What a run generated is written to `GENERATED`, as its groups no longer tell it: a shared beginning was generated once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from random import Random
from statistics import fmean

from torch import Tensor

from e3rl.rollout.group import GroupSettings
from e3rl.rollout.stats import summarise
from e3rl.train.collect import reward
from e3rl.train.state import Run
from e3rl.types import Draw, Group, Prompt, Segment

GENERATED = "generated.jsonl"
"""In the run's directory: a line a step."""

Beginning = tuple[Segment, ...]


class TwoRounds(ABC):
    """A run's rollouts, made in two rounds: responses of the second begin with segments of the first."""

    def __init__(self, run: Run) -> None:
        self._run, self._inner = run, run.rollouts

    def run(self, prompts: Sequence[Prompt], settings: GroupSettings, tick: Callable[[], None]) -> Iterator[Group]:
        """See `e3rl.cluster.rollouts.Rollouts.run`. Every beginning is put where the driver looks before it asks the engine."""
        run, before = self._run, self.first(settings)
        assert run.journal is not None, "rollouts of one process have a journal"
        first = list(self._inner.run(prompts, before, tick))
        begun = {group.prompt.problem.id: self.begin(group, before) for group in first}

        offset = before.rollout.num_generations
        after = sized(settings, settings.rollout.num_generations - self.keeps(settings), first_sibling=offset)
        known = run.journal.of(settings.step).known
        for name, beginnings in begun.items():
            for sibling, segments in enumerate(beginnings, offset):
                for segment in segments:
                    draw = Draw(settings.seed, settings.step, name, sibling, segment.index, attempt=0)
                    known[draw] = deque([segment.candidate])
        second = {group.prompt.problem.id: group for group in self._inner.run(prompts, after, tick)}

        shared = sum(len(s.candidate.ids) for found in begun.values() for segments in found for s in segments)
        tokens = summarise([*first, *second.values()]).generated_tokens - shared
        if run.directory is not None:
            run.directory.append(GENERATED, {"step": settings.step, "tokens": tokens})
        for group in first:
            both = (*group.trajectories[: self.keeps(settings)], *second[group.prompt.problem.id].trajectories)
            yield replace(group, trajectories=tuple(replace(t, sibling=i) for i, t in enumerate(both)))

    @abstractmethod
    def first(self, settings: GroupSettings) -> GroupSettings:
        """The settings of the first round."""

    @abstractmethod
    def keeps(self, settings: GroupSettings) -> int:
        """How many responses of the first round are whole and stay in the group."""

    @abstractmethod
    def begin(self, group: Group, settings: GroupSettings) -> list[Beginning]:
        """What each response of the second round begins with."""

    def paused(self) -> AbstractContextManager[None]:
        """See `e3rl.cluster.rollouts.Rollouts.paused`."""
        return self._inner.paused()

    def load_weights(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """See `e3rl.cluster.rollouts.Rollouts.load_weights`."""
        self._inner.load_weights(version, weights)

    def close(self) -> None:
        """Release what the inner rollouts hold."""
        self._inner.close()


class branched(TwoRounds):
    """Each whole response has a branch, which leaves it after a random segment."""

    def first(self, settings: GroupSettings) -> GroupSettings:
        """Half of the group."""
        return sized(settings, self.keeps(settings))

    def keeps(self, settings: GroupSettings) -> int:
        """All of them."""
        return settings.rollout.num_generations // 2

    def begin(self, group: Group, settings: GroupSettings) -> list[Beginning]:
        """At least one segment, but for responses of a single one."""
        random = Random(f"branches/{settings.seed}/{settings.step}/{group.prompt.problem.id}")
        return [t.segments[: random.randint(1, max(1, len(t.segments) - 1))] for t in group.trajectories]


class reset(branched):
    """The branches begin in wrong responses, in turn, before the segment with the largest U; in all where all are right."""

    def begin(self, group: Group, settings: GroupSettings) -> list[Beginning]:
        """The rewards are asked for here: one verdict more for each response."""
        [rewarded] = reward(self._run, [group])
        pairs = zip(group.trajectories, rewarded.rewards, strict=True)
        wrong = [t for t, value in pairs if not value.right] or list(group.trajectories)
        turns = [wrong[i % len(wrong)] for i in range(len(group.trajectories))]
        return [t.segments[: max(range(len(t.segments)), key=lambda i: suspicion(t.segments[i]))] for t in turns]


class pruned(TwoRounds):
    """Twice as many beginnings as the group has responses; those with the smaller mean U go on."""

    def first(self, settings: GroupSettings) -> GroupSettings:
        """Half a response."""
        rollout = settings.rollout
        shorter = replace(rollout, max_segments=max(1, rollout.max_segments // 2), max_completion_length=0)
        return sized(replace(settings, rollout=shorter), 2 * rollout.num_generations)

    def keeps(self, settings: GroupSettings) -> int:
        """None: all go on."""
        return 0

    def begin(self, group: Group, settings: GroupSettings) -> list[Beginning]:
        """In the order of U."""
        calm = sorted(group.trajectories, key=lambda t: fmean(suspicion(s) for s in t.segments))
        return [t.segments for t in calm[: len(calm) // 2]]


def suspicion(segment: Segment) -> float:
    """U of a segment, which has to be judged for it (``rollout.erase`` with ``erasure.max_erasures = 0``)."""
    assert segment.judgement is not None
    return segment.judgement.uncertainty.total


def sized(settings: GroupSettings, count: int, first_sibling: int = 0) -> GroupSettings:
    """For a group of so many responses, which draw under other numbers."""
    rollout = replace(settings.rollout, num_generations=count)
    return replace(settings, rollout=rollout, first_sibling=first_sibling)
