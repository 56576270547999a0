"""Groups that were submitted to a driver, and which of those that wait is next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from e3rl.environments.protocol import Episode
from e3rl.rollout.group import GroupRollout, GroupSettings
from e3rl.rollout.orders import Drawn, Event, Extend, Order
from e3rl.rollout.rows import GroupRows
from e3rl.types import Draw, Group, Prompt


@dataclass(eq=False, slots=True)
class GroupJob:
    """A submitted group. Once `Driver.step` returns it, it has a ``group``, or the ``error`` that stopped it."""

    prompt: Prompt
    settings: GroupSettings
    rollout: GroupRollout
    rows: GroupRows
    observe: Callable[[Event], None]
    client: tuple[str, ...] = ()  # who asked for it: rows are shared among clients, see `next_group`
    follow: bool = False  # the observer is told of tokens as they are drawn
    group: Group | None = None
    error: Exception | None = None
    version: int = 0  # of the weights that draw its next segments
    asked: list[tuple[Extend, Draw]] = field(default_factory=list)  # orders that wait for the group's rows
    episodes: dict[int, Episode] = field(default_factory=dict)  # environments, by sibling, from their first turn on

    def drawn(self, sibling: int, ids: list[int], logprobs: list[float]) -> list[Order]:
        """A sibling's open request grew by these tokens, which nothing will erase."""
        self.observe(Drawn(self.prompt.problem.id, sibling, ids, logprobs))
        return []

    def result(self) -> Group:
        """The group; raises what stopped it."""
        if self.error is not None:
            raise self.error
        assert self.group is not None
        return self.group


def next_group(waiting: Sequence[GroupJob], decoding: Iterable[GroupJob]) -> GroupJob:
    """The first waiting group of the client that has the fewest rows; of equals the one that came first.

    A client's name has parts: clients with the same first part share the rows of one client, and so on. So nobody has more of
    them by taking another last part for every group.
    """
    first = waiting[0]
    if all(job.client == first.client for job in waiting):
        return first
    rows: Counter[tuple[str, ...]] = Counter()
    for job in decoding:
        for part in _widening(job.client):
            rows[part] += len(job.rows.held)
    return min(waiting, key=lambda job: [rows[part] for part in _widening(job.client)])


def _widening(client: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The client's name up to its first part, up to the second, and so on."""
    return [client[:parts] for parts in range(1, len(client) + 1)]
