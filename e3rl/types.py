"""The values that travel through e3rl, one type per arrow of the data's way.

Standard library only: importing this module must stay free. Everything is frozen; a stage never edits what it was given.
Numbers per token are tuples of the same length as ``ids``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat prompt."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of a dataset. ``columns`` holds the row's other fields, handed to reward functions by name."""

    id: str
    prompt: str | tuple[Message, ...]
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A problem rendered through the chat template, as token ids. Never re-tokenised afterwards."""

    problem: Problem
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Draw:
    """Names one candidate of one run; all its random numbers derive from these fields and nothing else (spec §4)."""

    seed: int
    step: int
    prompt_id: str
    sibling: int
    segment: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A segment that was generated and is not yet judged.

    ``logprobs`` belong to the temperature-scaled distribution over the full vocabulary, before any truncation. So do
    ``entropies`` (nats) and ``perturbations``, eq 5's log p(argmax) - log p(sampled), unless
    `ErasureConfig.entropy_temperature` names another temperature for these two. ``kept_mass`` is the share of the
    distribution which top-k/top-p left to sample from (1.0 without truncation). ``ranks``: one more than the tokens that
    were likelier, so 1 for the likeliest. ``ended``: the last id is an end-of-sequence token.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    perturbations: tuple[float, ...]
    kept_mass: tuple[float, ...]
    ranks: tuple[int, ...]
    ended: bool


@dataclass(frozen=True, slots=True)
class Uncertainty:
    """Eq 13's U and its weighted terms, which add up to ``total``; ``smoothed`` is the unweighted H~_n of eq 11."""

    total: float
    base: float
    gradient: float
    extremum: float
    perturbation: float
    smoothed: float


@dataclass(frozen=True, slots=True)
class Threshold:
    """Eq 17's Theta = baseline * penalty * modulation."""

    total: float
    baseline: float
    penalty: float
    modulation: float


class Verdict(enum.StrEnum):
    """What the judge decides about a candidate (eq 24-25)."""

    COMMIT = "commit"
    ERASE = "erase"
    FORCED = "forced"  # above the threshold, but the erasure budget of this segment is spent


@dataclass(frozen=True, slots=True)
class Judgement:
    """Why a candidate was committed or erased. ``attempt``: erasures of this segment before this candidate."""

    uncertainty: Uncertainty
    threshold: Threshold
    attempt: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Segment:
    """A committed candidate. ``judgement`` is None where nothing was judged: a plain rollout."""

    index: int
    candidate: Candidate
    judgement: Judgement | None


@dataclass(frozen=True, slots=True)
class Erasure:
    """An erased candidate, kept for the report and for contrast. ``start``: committed response tokens before it."""

    index: int
    start: int
    candidate: Candidate
    judgement: Judgement


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A prompt's response: its committed segments, and what was erased on the way, in the order it happened."""

    prompt: Prompt
    sibling: int
    segments: tuple[Segment, ...]
    erasures: tuple[Erasure, ...]
    finish: Literal["stop", "length"]

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(i for s in self.segments for i in s.candidate.ids)

    @property
    def logprobs(self) -> tuple[float, ...]:
        return tuple(x for s in self.segments for x in s.candidate.logprobs)

    @property
    def entropies(self) -> tuple[float, ...]:
        return tuple(x for s in self.segments for x in s.candidate.entropies)

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        return tuple(len(s.candidate.ids) for s in self.segments)

    @property
    def committed_tokens(self) -> int:
        return sum(self.segment_lengths)

    @property
    def erased_tokens(self) -> int:
        return sum(len(e.candidate.ids) for e in self.erasures)


@dataclass(frozen=True, slots=True)
class Group:
    """All siblings of one prompt, by sibling number, and the policy version that made them (None: a demonstration)."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    policy_version: int | None


@dataclass(frozen=True, slots=True)
class Reward:
    """A trajectory's reward. ``value`` is None when it is missing (the function failed): never counted as 0.

    ``parts`` holds each reward function's own unweighted value by name; ``error`` says why a value is missing.
    """

    value: float | None
    parts: Mapping[str, float | None]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RewardedGroup:
    """A group and its trajectories' rewards, in the same order."""

    group: Group
    rewards: tuple[Reward, ...]
