"""What a batch of rollouts cost and how often it erased, derived from the groups alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from e3rl.equations.erasure import regeneration_ratio
from e3rl.types import Candidate, Erasure, Group, Segment, Trajectory, Verdict


@dataclass(frozen=True)
class RolloutStats:
    """Counts of one batch. A candidate is counted once, however often it was drawn; ``_N`` is by segment index."""

    groups: int
    trajectories: int
    stopped: int  # trajectories that ended in EOS
    committed_tokens: int
    erased_tokens: int
    redrawn_tokens: int  # drawn a second time and committed (`on_exhausted` = 'least_uncertain')
    erasures: int  # erased turns among them
    forced: int  # segments committed above their threshold
    candidates_N: tuple[int, ...]
    accepted_N: tuple[int, ...]  # committed without force
    kept_mass: float  # mean over committed and erased tokens; NaN without any

    @property
    def candidates(self) -> int:
        """Candidates, committed and erased."""
        return sum(self.candidates_N)

    @property
    def generated_tokens(self) -> int:
        """All tokens that the engine had to generate."""
        return self.committed_tokens + self.erased_tokens + self.redrawn_tokens

    @property
    def erase_rate(self) -> float:
        """Share of candidates that were erased."""
        return _share(self.erasures, self.candidates)

    @property
    def forced_rate(self) -> float:
        """Share of committed segments that were forced."""
        return _share(self.forced, self.candidates - self.erasures)

    @property
    def stop_rate(self) -> float:
        """Share of trajectories that ended with EOS."""
        return _share(self.stopped, self.trajectories)

    @property
    def mean_length(self) -> float:
        """Committed tokens of a trajectory."""
        return _share(self.committed_tokens, self.trajectories)

    @property
    def r(self) -> float:
        """Tokens generated beyond the committed ones, redraws included, per committed token."""
        if not self.committed_tokens:
            return 0.0
        return regeneration_ratio(self.generated_tokens - self.committed_tokens, self.committed_tokens)

    @property
    def acceptance_N(self) -> tuple[float, ...]:
        """By segment index: share of the candidates that were accepted at or below their threshold."""
        return tuple(_share(a, c) for a, c in zip(self.accepted_N, self.candidates_N, strict=True))


def summarise(groups: Iterable[Group]) -> RolloutStats:
    """The statistics of a batch of rollouts."""
    groups = list(groups)
    trajectories = [t for g in groups for t in g.trajectories]
    segments = [s for t in trajectories for s in t.drawn_segments]
    erasures = [e for t in trajectories for e in t.erasures]
    records: list[Segment | Erasure] = [*segments, *erasures]
    drawn = Counter(record.index for record in records)
    accepted = Counter(s.index for s in segments if s.judgement is None or s.judgement.verdict is Verdict.COMMIT)
    return RolloutStats(
        groups=len(groups),
        trajectories=len(trajectories),
        stopped=sum(t.finish == "stop" for t in trajectories),
        committed_tokens=sum(t.committed_tokens for t in trajectories),
        erased_tokens=sum(t.erased_tokens for t in trajectories),
        redrawn_tokens=sum(redrawn_tokens(t) for t in trajectories),
        erasures=len(erasures),
        forced=sum(_is_forced(s) for s in segments),
        candidates_N=tuple(drawn[n] for n in range(max(drawn, default=-1) + 1)),
        accepted_N=tuple(accepted[n] for n in range(max(drawn, default=-1) + 1)),
        kept_mass=_mean_kept_mass(record.candidate for record in records),
    )


def redrawn_tokens(trajectory: Trajectory) -> int:
    """Tokens drawn twice: those of segments where an earlier attempt was committed after a later one was erased.

    A redraw with other tokens does not count: both candidates are on record.
    """
    last_erased = {e.index: e.judgement.attempt for e in trajectory.erasures}
    erased = {(e.index, e.judgement.attempt) for e in trajectory.erasures}
    return sum(
        len(s.candidate.ids)
        for s in trajectory.segments
        if s.judgement is not None
        and s.judgement.attempt < last_erased.get(s.index, 0)
        and (s.index, s.judgement.attempt) not in erased
    )


def _is_forced(segment: Segment) -> bool:
    return segment.judgement is not None and segment.judgement.verdict is Verdict.FORCED


def _mean_kept_mass(candidates: Iterable[Candidate]) -> float:
    masses = [mass for c in candidates for mass in c.kept_mass.tolist()]
    return math.fsum(masses) / len(masses) if masses else math.nan


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
