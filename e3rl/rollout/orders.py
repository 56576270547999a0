"""Events, which a group sends to observers, and orders, which it gives the driver."""

from __future__ import annotations

from dataclasses import dataclass

from e3rl.types import Erasure, Group, Segment


@dataclass(frozen=True, slots=True)
class Committed:
    """A sibling's response grew by a segment."""

    prompt_id: str
    sibling: int
    segment: Segment


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens of a plain sibling's segment under way, behind those told before: they will stand in it."""

    prompt_id: str
    sibling: int
    ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True, slots=True)
class Erased:
    """A candidate was judged too uncertain and dropped."""

    prompt_id: str
    sibling: int
    erasure: Erasure


@dataclass(frozen=True, slots=True)
class Finished:
    """All siblings of a group are complete."""

    group: Group


Event = Drawn | Committed | Erased | Finished


@dataclass(frozen=True, slots=True)
class Extend:
    """Cut the sibling's row to its first ``start`` response tokens, then generate up to ``tokens`` more."""

    sibling: int
    start: int
    tokens: int
    segment: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Act:
    """An assistant turn ended: hand ``ids`` to the sibling's environment. Segment and attempt name the answer."""

    sibling: int
    ids: tuple[int, ...]
    segment: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Undo:
    """The sibling's last turn was erased: its environment is to go back to where it was, and the group waits to be told."""

    sibling: int


@dataclass(frozen=True, slots=True)
class Release:
    """The sibling's response is complete: its row is no longer needed."""

    sibling: int


Order = Extend | Act | Undo | Release
