"""Calibration statistics: what U usually is at each segment index, for prompts that have no siblings.

They are gathered from rollouts during training or calibration and saved beside the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from e3rl.config import ErasureConfig, RolloutConfig
from e3rl.errors import UserError
from e3rl.files import write_json
from e3rl.parsing import read_json
from e3rl.rollout.moments import Distribution, Moments
from e3rl.rollout.value import ValueHead
from e3rl.types import TERMS, Erasure, Group, RewardedGroup, Segment, Trajectory

FILE_NAME = "e3rl_reference.json"
FORMAT = 1
MEASURED_BY = (
    "metric",
    "entropy_distribution",
    "entropy_temperature",
    *(f"{term}_weight" for term in TERMS),
    "length_exponent",
    "smoothing_window",
    "smoothing_decay",
)
"""Fields of `ErasureConfig` that define U. Statistics of U mean nothing under other values."""


def measured_by(rollout: RolloutConfig, erasure: ErasureConfig) -> dict[str, Any]:
    """The settings that define U, by dotted name."""
    settings = {f"erasure.{name}": getattr(erasure, name) for name in MEASURED_BY}
    names = ("boundary", "boundary_level", "min_segment_length") if rollout.boundary != "length" else ()
    return {
        **{f"rollout.{name}": getattr(rollout, name) for name in names},
        "rollout.segment_length": rollout.segment_length,
        "rollout.temperature": rollout.temperature,
        **settings,
    }


def first_candidates(trajectory: Trajectory) -> Iterator[Segment | Erasure]:
    """The first candidate of every segment, committed or erased; an unjudged segment is its own first candidate.

    Observations and erased turns are no candidates: indices count drawn segments.
    """
    records: list[Segment | Erasure] = [*trajectory.segments, *trajectory.erasures]
    for record in records:
        if record.observation is None and (record.judgement is None or record.judgement.attempt == 0):
            index = trajectory.drawn_index(record.index)
            yield record if index == record.index else replace(record, index=index)


def entropy_moments(groups: Iterable[Group]) -> Moments:
    """Moments of the token entropies of a batch's first candidates and committed segments.

    Demonstrations have none.
    """
    moments = Moments()
    for trajectory in (t for g in groups if g.policy_version is not None for t in g.trajectories):
        firsts = [e.candidate for e in trajectory.erasures if e.judgement.attempt == 0 and e.observation is None]
        for candidate in (*firsts, *(s.candidate for s in trajectory.drawn_segments)):
            moments = moments.merged(Moments.of(candidate.entropies))
    return moments


@dataclass(frozen=True)
class CalibrationStatistics:
    """How first candidates' U is distributed, by segment index, and mean and spread of their token entropies.

    ``settings`` are those of `measured_by` that U was measured with. ``head``: what a metric that learns knows.
    """

    settings: Mapping[str, Any]
    segments: tuple[Distribution, ...] = ()
    entropies: Moments = field(default_factory=Moments)
    head: ValueHead | None = None

    def at(self, index: int) -> Distribution:
        """U at a segment index; beyond the last known index, at the last known."""
        if not self.segments:
            raise UserError(
                f"the calibration statistics hold no segments: gather them with 'e3rl calibrate' ({FILE_NAME})"
            )
        return self.segments[min(index, len(self.segments) - 1)]

    def merged(self, other: CalibrationStatistics) -> CalibrationStatistics:
        """Both sets of observations together."""
        other.check(self.settings)
        pairs = zip_longest(self.segments, other.segments, fillvalue=Distribution())
        segments = tuple(a.merged(b) for a, b in pairs)
        entropies = self.entropies.merged(other.entropies)
        return CalibrationStatistics(self.settings, segments, entropies, self.head or other.head)

    def taught(self, groups: Iterable[RewardedGroup]) -> CalibrationStatistics:
        """These statistics after a metric that learns has learnt from a step's rewards."""
        return self if self.head is None else replace(self, head=self.head.taught(groups))

    def including(self, groups: Iterable[Group]) -> CalibrationStatistics:
        """These statistics with the judged first candidates of ``groups`` added. Retries never feed them."""
        by_index: dict[int, list[float]] = {}
        entropies = Moments()
        for record in (r for g in groups for t in g.trajectories for r in first_candidates(t)):
            if record.judgement is not None:
                by_index.setdefault(record.index, []).append(record.judgement.uncertainty.total)
                entropies = entropies.merged(Moments.of(record.candidate.entropies))
        segments = tuple(Distribution.of(by_index.get(n, [])) for n in range(max(by_index, default=-1) + 1))
        return self.merged(CalibrationStatistics(self.settings, segments, entropies))

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise UserError where these statistics were measured with other settings. A setting that the file doesn't name is
        newer than the file and had its default."""
        usual = measured_by(RolloutConfig(), ErasureConfig())
        then, now = {**usual, **self.settings}, {**usual, **settings}
        differing = [n for n in sorted(then | now) if then.get(n) != now.get(n)]
        if differing:
            details = "; ".join(f"{n}: {then.get(n)!r} then, {now.get(n)!r} now" for n in differing)
            raise UserError(
                f"the calibration statistics were measured with other settings ({details}): take the former, "
                "calibrate again, or decode without erasing"
            )

    def to_tables(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "format": FORMAT,
            "settings": dict(self.settings),
            "segments": [distribution.to_table() for distribution in self.segments],
            "entropies": self.entropies.to_table(),
            **({} if self.head is None else {"head": self.head.to_table()}),
        }

    @staticmethod
    def from_tables(tables: Mapping[str, Any]) -> CalibrationStatistics:
        """What `to_tables` gave; KeyError, TypeError or ValueError where the tables can't have come from it."""
        if tables["format"] != FORMAT:
            raise ValueError(f"format {tables['format']!r}, and this version of e3rl reads format {FORMAT}")
        segments = tuple(Distribution.from_table(table) for table in tables["segments"])
        head = ValueHead.from_table(tables["head"]) if "head" in tables else None
        return CalibrationStatistics(dict(tables["settings"]), segments, Moments.from_table(tables["entropies"]), head)

    def save(self, directory: Path) -> Path:
        """Write them beside a model, atomically."""
        path = directory / FILE_NAME
        write_json(path, self.to_tables())
        return path

    @staticmethod
    def load(directory: Path) -> CalibrationStatistics:
        """Read what `save` wrote; UserError says what is wrong with a missing or damaged file."""
        path = directory / FILE_NAME
        try:
            return CalibrationStatistics.from_tables(read_json(path))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: make it with 'e3rl calibrate'") from None
        except UserError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise UserError(f"{path} is damaged ({reason}): make it again with 'e3rl calibrate'") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error!r}): make it again with 'e3rl calibrate'") from None
