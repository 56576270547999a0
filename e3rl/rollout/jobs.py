"""A submitted group, as the driver and its callers hold it."""

from __future__ import annotations

from dataclasses import dataclass, field

from e3rl.engine.protocol import Row
from e3rl.environments.protocol import Episode
from e3rl.rollout.group import GroupRollout, GroupSettings
from e3rl.rollout.orders import Extend
from e3rl.types import Draw, Group, Prompt


@dataclass(eq=False, slots=True)
class GroupJob:
    """A submitted group. Once `Driver.step` returns it, it has a ``group``, or the ``error`` that stopped it."""

    prompt: Prompt
    settings: GroupSettings
    rollout: GroupRollout | None = None
    group: Group | None = None
    error: Exception | None = None
    version: int = 0  # of the weights that draw its next segments
    asked: list[tuple[Extend, Draw]] = field(default_factory=list)  # what it will ask for when it gets its rows
    rows: dict[int, Row] = field(default_factory=dict)  # by sibling
    offsets: dict[int, int] = field(default_factory=dict)  # response tokens that a sibling's row has as its prompt
    episodes: dict[int, Episode] = field(default_factory=dict)  # environments, by sibling, from their first turn on
    acting: set[object] = field(default_factory=set)  # turns that are being answered

    def result(self) -> Group:
        """The group; raises what stopped it."""
        if self.error is not None:
            raise self.error
        assert self.group is not None
        return self.group
