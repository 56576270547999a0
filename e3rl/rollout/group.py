"""One group while it is generated: what each sibling has committed and erased, and what it needs next.

A state machine: `deliver` takes a candidate and returns orders. It knows no engine, so nothing here generates or waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import numpy as np

from e3rl.config import ErasureConfig, RolloutConfig
from e3rl.engine.protocol import Boundary, LogitsHook, Sampling
from e3rl.environments.protocol import Episode, Reply
from e3rl.equations.erasure import least_uncertain, next_state, segment_size
from e3rl.rollout.judge import GroupJudge, needs_calibration, require_calibration
from e3rl.rollout.metric import CandidatePlace
from e3rl.rollout.moments import Moments
from e3rl.rollout.orders import Act, Committed, Erased, Event, Extend, Finished, Order, Release, Undo
from e3rl.rollout.statistics import CalibrationStatistics, measured_by
from e3rl.rollout.turns import given, joined
from e3rl.types import (
    Candidate,
    Draw,
    Erasure,
    Group,
    Judgement,
    Observed,
    Prompt,
    Segment,
    Threshold,
    Trajectory,
    Uncertainty,
    Verdict,
)


@dataclass(frozen=True)
class GroupSettings:
    """Everything that a group depends on beside its prompt and the weights. All groups of a batch share it.

    ``calibration`` is needed where thresholds can't come from the group (see `require_calibration`); ``entropy_moments`` of
    the previous batch serve ``erasure.entropy_reference = "batch"``. ``first_sibling`` is the number under which a
    group's first sibling draws: many samples of a prompt, divided into small groups, then draw as those of a large
    one. ``hooks``, one a sibling, are for a `ServingEngine`.
    """

    rollout: RolloutConfig
    erasure: ErasureConfig
    seed: int
    step: int = 0
    policy_version: int = 0
    calibration: CalibrationStatistics | None = None
    entropy_moments: Moments | None = None
    first_sibling: int = 0
    min_p: float = 0.0
    hooks: Sequence[LogitsHook] = field(default=(), metadata={"local": True})

    @cached_property
    def sampling(self) -> Sampling:
        """How the engine is to draw."""
        rollout, erasure = self.rollout, self.erasure
        ends = rollout.boundary, rollout.boundary_level, rollout.min_segment_length
        return Sampling(
            rollout.temperature,
            rollout.top_p,
            rollout.top_k,
            erasure.entropy_distribution,
            erasure.entropy_temperature,
            self.min_p,
            Boundary(*ends) if rollout.boundary != "length" else None,
        )

    def draw(self, prompt_id: str, order: Extend | Act) -> Draw:
        """The name of a requested candidate."""
        sibling = self.first_sibling + order.sibling
        return Draw(self.seed, self.step, prompt_id, sibling, order.segment, order.attempt)

    def check(self) -> None:
        """Raise UserError where calibration statistics are needed and missing, or were measured with other settings."""
        if self.rollout.erase:
            siblings = self.rollout.num_generations
            require_calibration(siblings, self.erasure, self.calibration)
            if self.calibration is not None and needs_calibration(siblings, self.erasure):
                self.calibration.check(measured_by(self.rollout, self.erasure))


@dataclass(slots=True)
class _Sibling:
    number: int
    segments: list[Segment] = field(default_factory=list)
    erasures: list[Erasure] = field(default_factory=list)
    committed: int = 0
    attempt: int = 0
    waiting: Candidate | None = None  # a first candidate whose barrier is closed
    redrawn: bool = False  # the open request repeats an earlier attempt, which will be committed
    finish: Literal["stop", "length"] | None = None
    failure: str | None = None
    turn: int = 0  # the first segment of the assistant turn under way
    try_from: int = 0  # erasures before the turn was begun, for the last time
    tries: int = 0  # erasures of that turn
    erased_turns: int = 0  # of the whole response
    against: Observed | None = None  # what the turn is erased for, once its environment is back

    def attempts(self) -> list[Erasure]:
        """Erased candidates of the segment under way, by attempt."""
        return [e for e in self.erasures[self.try_from :] if e.index == len(self.segments)]

    def drawn(self) -> int:
        """Committed segments that were drawn: what the judge counts."""
        return sum(s.observation is None for s in self.segments)


class GroupRollout:
    """The siblings of one prompt. A plain rollout has no judge: every candidate is committed unseen."""

    def __init__(self, prompt: Prompt, settings: GroupSettings, observe: Callable[[Event], None]) -> None:
        self.prompt, self._settings = prompt, settings
        self._config, self._version = settings.rollout, settings.policy_version
        self._on_exhausted, self._attempts = settings.erasure.on_exhausted, settings.erasure.max_erasures + 1
        self._observe = observe
        self._siblings = [_Sibling(number) for number in range(self._config.num_generations)]
        self._judge: GroupJudge | None = None

    @property
    def finished(self) -> bool:
        """Whether every sibling's response is complete."""
        return all(s.finish for s in self._siblings)

    def unfinished(self) -> list[int]:
        """Siblings whose response is not complete."""
        return [s.number for s in self._siblings if s.finish is None]

    def committed_ids(self, number: int) -> list[int]:
        """The tokens that a sibling's response has so far."""
        return [i for segment in self._siblings[number].segments for i in segment.candidate.ids.tolist()]

    def group(self, episodes: Mapping[int, Episode] = MappingProxyType({})) -> Group:
        """The finished group, each trajectory with its environment; observers are told."""
        trajectories = []
        for s in self._siblings:
            if s.finish is None:
                raise RuntimeError(f"sibling {s.number} of prompt '{self.prompt.problem.id}' is not finished")
            environment = episodes[s.number].environment if s.number in episodes else None
            made = tuple(s.segments), tuple(s.erasures), s.finish, s.failure, environment
            trajectories.append(Trajectory(self.prompt, s.number, *made))
        group = Group(self.prompt, tuple(trajectories), self._version)
        self._observe(Finished(group))
        return group

    def start(self) -> list[Order]:
        """Every sibling's first request; UserError where the settings need calibration statistics that are not there."""
        settings = self._settings
        settings.check()
        if settings.rollout.erase:
            self._judge = GroupJudge(
                len(self._siblings), settings.erasure, settings.calibration, settings.entropy_moments, self._place
            )
        return [self._extend(s) for s in self._siblings]

    def deliver(self, number: int, candidate: Candidate) -> list[Order]:
        """Take a sibling's candidate from the engine; return the group's next orders."""
        sibling = self._siblings[number]
        self._check(sibling, candidate)
        if self._judge is None:
            return self._commit(sibling, candidate, None)
        if sibling.attempt == 0 and not sibling.redrawn and self._judge.expects(number):
            self._judge.deliver(number, candidate)
            sibling.waiting = candidate
            return self._judge_waiting(self._judge)
        return self._decide(self._judge, sibling, candidate) + self._judge_waiting(self._judge)

    def _judge_waiting(self, judge: GroupJudge) -> list[Order]:
        """Judge all candidates whose barrier is open. One that finishes its sibling may open the next barrier."""
        orders: list[Order] = []
        while ready := [s for s in self._siblings if s.waiting and judge.ready(s.drawn())]:
            for sibling in ready:
                candidate, sibling.waiting = sibling.waiting, None
                assert candidate is not None
                orders += self._decide(judge, sibling, candidate)
        return orders

    def _decide(self, judge: GroupJudge, sibling: _Sibling, candidate: Candidate) -> list[Order]:
        if sibling.redrawn:
            return self._commit_redrawn(judge, sibling, candidate)
        judgement = judge.judge(sibling.number, candidate, sibling.attempt)
        if judgement.verdict in (Verdict.COMMIT, Verdict.SPARED):
            return self._commit(sibling, candidate, judgement)
        if judgement.verdict is Verdict.ERASE:
            self._erase(sibling, candidate, judgement)
            _, attempt = next_state(sibling.committed, len(candidate.ids), sibling.attempt, Verdict.ERASE)
            return [self._redraw(sibling, attempt)]
        return self._exhausted(sibling, candidate, judgement)

    def _exhausted(self, sibling: _Sibling, candidate: Candidate, judgement: Judgement) -> list[Order]:
        """The budget is spent on a candidate above its threshold: the forced accept, as `on_exhausted` sets it."""
        earlier = [e.judgement.uncertainty.total for e in sibling.attempts()]
        best = least_uncertain([*earlier, judgement.uncertainty.total])
        if self._on_exhausted == "last" or best == judgement.attempt:
            return self._commit(sibling, candidate, judgement)
        self._erase(sibling, candidate, replace(judgement, verdict=Verdict.ERASE))
        sibling.redrawn = True
        return [self._redraw(sibling, best)]

    def _commit_redrawn(self, judge: GroupJudge, sibling: _Sibling, candidate: Candidate) -> list[Order]:
        """Commit the chosen attempt, which no longer counts as erased; its first measurement stands.

        An engine whose arithmetic depends on what else is in the batch may draw other tokens this time. Then what it
        drew is committed, under a measurement of its own, and the erased candidate stays on record.
        """
        erased = sibling.attempts()[sibling.attempt]
        if np.array_equal(erased.candidate.ids, candidate.ids):
            sibling.erasures = [e for e in sibling.erasures if e is not erased]
            candidate, judgement = erased.candidate, erased.judgement
        else:
            judgement = judge.judge(sibling.number, candidate, sibling.attempt)
        return self._commit(sibling, candidate, replace(judgement, verdict=Verdict.FORCED))

    def _erase(self, sibling: _Sibling, candidate: Candidate, judgement: Judgement) -> None:
        erasure = Erasure(len(sibling.segments), sibling.committed, candidate, judgement)
        sibling.erasures.append(erasure)
        self._observe(Erased(self.prompt.problem.id, sibling.number, erasure))

    def _redraw(self, sibling: _Sibling, attempt: int) -> Order:
        sibling.attempt = attempt
        return self._extend(sibling)

    def _commit(self, sibling: _Sibling, candidate: Candidate, judgement: Judgement | None) -> list[Order]:
        segment = Segment(len(sibling.segments), candidate, judgement)
        sibling.segments.append(segment)
        size = len(candidate.ids)
        sibling.committed, sibling.attempt = next_state(sibling.committed, size, sibling.attempt, Verdict.COMMIT)
        sibling.redrawn = False
        if self._judge is not None and judgement is not None:
            self._judge.commit(sibling.number, candidate, judgement)
        self._observe(Committed(self.prompt.problem.id, sibling.number, segment))
        if candidate.ended and self.prompt.tools is not None:
            return [self._act(sibling)]
        if candidate.ended or sibling.committed == self._config.completion_limit:
            return [self._finish(sibling, "stop" if candidate.ended else "length")]
        return [self._extend(sibling)]

    def _act(self, sibling: _Sibling) -> Act:
        ids = tuple(i for s in sibling.segments[sibling.turn :] for i in s.candidate.ids.tolist())
        return Act(sibling.number, ids, len(sibling.segments), sibling.erased_turns * self._attempts)

    def observe(self, number: int, reply: Reply) -> list[Order]:
        """Take what the environment answered to a sibling's turn, or to `Undo`. In a judged rollout it may erase the turn."""
        sibling, observation = self._siblings[number], reply.observation
        if sibling.against is not None and reply.failure is None:
            return self._erase_turn(sibling, sibling.against)
        if reply.failure is not None or observation is None:
            sibling.failure = reply.failure
            return self._conclude(sibling, "length" if reply.end == "length" else "stop")
        if (
            sibling.committed + len(reply.ids) >= self._config.completion_limit
        ):  # no room to continue: the observation is not added
            return self._conclude(sibling, "length")
        tools, judged = self.prompt.tools, self._judge is not None
        against = judged and observation.evidence > tools.threshold
        if against and reply.undoable and sibling.tries < tools.erasures:
            sibling.against = observation
            return [Undo(number)]
        segment = Segment(len(sibling.segments), given(reply.ids), None, replace(observation, forced=against))
        sibling.segments.append(segment)
        sibling.committed += len(reply.ids)
        sibling.turn, sibling.tries, sibling.try_from = len(sibling.segments), 0, len(sibling.erasures)
        self._observe(Committed(self.prompt.problem.id, number, segment))
        return [self._extend(sibling)]

    def _conclude(self, sibling: _Sibling, how: Literal["stop", "length"]) -> list[Order]:
        return [self._finish(sibling, how), *(self._judge_waiting(self._judge) if self._judge else ())]

    def _erase_turn(self, sibling: _Sibling, observation: Observed) -> list[Order]:
        """Drop the whole turn with what it led to, and draw it again from the same prefix and state."""
        turn = joined([s.candidate for s in sibling.segments[sibling.turn :]])
        sibling.committed -= len(turn.ids)
        limit, u = self.prompt.tools.threshold, Uncertainty(observation.evidence, 0.0, 0.0, 0.0, 0.0, 0.0)
        judgement = Judgement(u, Threshold(limit, limit, 1.0, 1.0), sibling.tries, Verdict.ERASE)
        erasure = Erasure(sibling.turn, sibling.committed, turn, judgement, observation)
        del sibling.segments[sibling.turn :]
        sibling.erasures.append(erasure)
        sibling.tries, sibling.erased_turns, sibling.against = sibling.tries + 1, sibling.erased_turns + 1, None
        sibling.try_from = len(sibling.erasures)
        assert self._judge is not None  # only judged rollouts erase turns
        self._judge.rollback(sibling.number, sibling.drawn())
        self._observe(Erased(self.prompt.problem.id, sibling.number, erasure))
        return [self._extend(sibling)]

    def _finish(self, sibling: _Sibling, how: Literal["stop", "length"]) -> Order:
        sibling.finish = how
        if self._judge is not None:
            self._judge.finish(sibling.number)
        return Release(sibling.number)

    def _extend(self, sibling: _Sibling) -> Extend:
        attempt = sibling.attempt + sibling.erased_turns * self._attempts
        return Extend(
            sibling.number, sibling.committed, self._tokens(sibling), segment=len(sibling.segments), attempt=attempt
        )

    def _place(self, number: int) -> CandidatePlace:
        draw = self._settings.draw(self.prompt.problem.id, self._extend(self._siblings[number]))
        return CandidatePlace(self.prompt, self.committed_ids(number), draw)

    def _tokens(self, sibling: _Sibling) -> int:
        return segment_size(sibling.committed, self._config.segment_length, self._config.completion_limit)

    def _check(self, sibling: _Sibling, candidate: Candidate) -> None:
        """Check the candidate's length: an empty one would keep a response going for ever."""
        asked, got = self._tokens(sibling), len(candidate.ids)
        if got > asked or got == 0 or (got < asked and not candidate.ended and self._config.boundary == "length"):
            where = f"prompt '{self.prompt.problem.id}', sibling {sibling.number}, segment {len(sibling.segments)}"
            raise RuntimeError(
                f"the engine was asked for {asked} tokens or an end of sequence and returned {got} ({where})"
            )
