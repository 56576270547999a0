"""Which groups a step is trained on (dynamic sampling), and the prompts that take the place of dropped ones.

A filter sees rewards only, so it works with every objective and with plain and erased rollouts alike.
"""

from __future__ import annotations

from collections.abc import Callable

from e3rl.config import FilterConfig
from e3rl.errors import unknown
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
    """DAPO's dynamic sampling: groups with right and wrong answers (`Reward.right`), whatever else moves their rewards apart."""
    return {True, False} <= {r.right for r in group.rewards}


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
