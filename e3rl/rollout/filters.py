"""Which groups a step is trained on (dynamic sampling), and the loop that rolls out more in place of dropped ones.

A filter sees rewards only, so it works with every objective and with plain and erased rollouts alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from e3rl.config import FilterConfig
from e3rl.errors import unknown
from e3rl.rollout.stats import summarise
from e3rl.types import Prompt, RewardedGroup

GroupFilter = Callable[[RewardedGroup], bool]
"""Whether a group is trained on."""


def keep_all(group: RewardedGroup) -> bool:
    """Every group."""
    return True


def nonzero_spread(group: RewardedGroup) -> bool:
    """Groups with at least two different rewards: in all others a group-normalised advantage is 0."""
    return len({r.value for r in group.rewards if r.value is not None}) > 1


def mixed_accuracy(group: RewardedGroup) -> bool:
    """Groups with right and wrong answers by the first reward function, whatever other functions add (DAPO's rule)."""
    first = [next(iter(r.parts.values()), None) for r in group.rewards]
    return len({value >= 1 for value in first if value is not None}) > 1


FILTERS: dict[str, GroupFilter] = {
    "none": keep_all,
    "nonzero_spread": nonzero_spread,
    "mixed_accuracy": mixed_accuracy,
}


def build_filter(config: FilterConfig) -> GroupFilter:
    """The filter that the config names."""
    if config.name not in FILTERS:
        raise unknown("filter", config.name, FILTERS)
    return FILTERS[config.name]


@dataclass(frozen=True)
class Collected:
    """A step's groups with their rewards: those to train on, those that the filter dropped, and what that took."""

    kept: tuple[RewardedGroup, ...]
    dropped: tuple[RewardedGroup, ...] = ()
    refills: int = 0

    @property
    def all(self) -> tuple[RewardedGroup, ...]:
        """Kept groups first, so that a position in ``kept`` is the same position here."""
        return self.kept + self.dropped

    @property
    def dropped_tokens(self) -> int:
        """Tokens that were generated for nothing."""
        return summarise(item.group for item in self.dropped).generated_tokens


def fresh_prompts(take: Callable[[int], list[Prompt]], count: int, seen: set[str], available: int) -> list[Prompt]:
    """The stream's next ``count`` prompts whose ids are not in ``seen``, or fewer where all ``available`` were tried.

    Taken one by one: asked for several, the stream would skip the last ones of an epoch that can't give them all.
    """
    found: dict[str, Prompt] = {}
    for _ in range(2 * available):  # the rest of this epoch, then a whole one
        if len(found) == count:
            break
        found |= {p.problem.id: p for p in take(1) if p.problem.id not in seen}
    return list(found.values())


def collect(
    wanted: int,
    take: Callable[[int], list[Prompt]],
    make: Callable[[Sequence[Prompt]], Sequence[RewardedGroup]],
    keep: GroupFilter,
    *,
    max_refills: int,
    available: int,
) -> Collected:
    """Groups of different prompts until ``wanted`` pass the filter, refills are spent or prompts run out.

    ``take`` gives the stream's next prompts, of which there are ``available``; ``make`` rolls them out and rewards them.
    A refill asks for as many groups as are missing, so no group that passes is ever thrown away.
    """
    kept: list[RewardedGroup] = []
    dropped: list[RewardedGroup] = []
    seen: set[str] = set()
    prompts, refills = take(wanted), 0
    while prompts:
        seen |= {p.problem.id for p in prompts}
        for group in make(prompts):
            (kept if keep(group) else dropped).append(group)
        if len(kept) == wanted or refills == max_refills:
            break
        prompts = fresh_prompts(take, wanted - len(kept), seen, available)
        refills += bool(prompts)
    return Collected(tuple(kept), tuple(dropped), refills)
