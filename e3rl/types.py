"""The types that pass between the stages of e3rl, one per arrow of docs/data-way.md.

Importing is cheap: numpy comes with the first candidate. Everything is frozen; a stage never changes its input. Numbers per
token are read-only numpy arrays of the same length as ``ids``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    Ids = NDArray[np.int32]
    Numbers = NDArray[np.float64]


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
    tools: Any = field(default=None, compare=False, repr=False)
    """What answers its tool calls (`e3rl.environments.protocol.Tools`); None: a single answer ends the response."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Names one candidate of one run; all its random numbers derive from these fields and nothing else (spec §4)."""

    seed: int
    step: int
    prompt_id: str
    sibling: int
    segment: int
    attempt: int


IDS = ("ids", "ranks")
MEASURES = ("logprobs", "entropies", "perturbations", "kept_mass")
COLUMNS = ("ids", *MEASURES, "ranks")
"""The per-token fields of `Candidate`: whole numbers, what the engine measured, and all of them in order."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A segment that was generated and is not yet judged.

    Any sequence of numbers may be given for a per-token field; it is kept as a read-only array: int32 for ``ids`` and ``ranks``,
    and float64 of single precision for the others (engines measure in float32, and everything that stores or sends a candidate
    keeps float32, so what was judged is what is read back). Two candidates are equal where all their numbers are.

    ``logprobs`` belong to the temperature-scaled distribution over the full vocabulary, before any truncation. So do
    ``entropies`` (nats) and ``perturbations``, eq 5's log p(argmax) - log p(sampled), unless
    `ErasureConfig.entropy_temperature` names another temperature for these two. ``kept_mass`` is the share of the
    distribution which top-k/top-p left to sample from (1.0 without truncation). ``ranks``: 1 for the likeliest.
    ``ended``: the last id ends the sequence. ``version``: updates of the weights that drew it, set by the driver, not compared.
    """

    ids: Ids
    logprobs: Numbers
    entropies: Numbers
    perturbations: Numbers
    kept_mass: Numbers
    ranks: Ids
    ended: bool
    version: int | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            ids: ArrayLike,
            logprobs: ArrayLike,
            entropies: ArrayLike,
            perturbations: ArrayLike,
            kept_mass: ArrayLike,
            ranks: ArrayLike,
            ended: bool,
            version: int | None = None,
        ) -> None: ...

    else:

        def __post_init__(self) -> None:
            import numpy as np

            for name in IDS:
                object.__setattr__(self, name, _read_only(np.array(getattr(self, name), np.int32)))
            for name in MEASURES:
                object.__setattr__(self, name, _read_only(np.array(getattr(self, name), np.float32).astype(np.float64)))

    @classmethod
    def wrap(cls, *columns: Any, ended: bool, version: int | None = None) -> Candidate:
        """A candidate from arrays in field order that already have its types and are read-only: nothing is checked or copied."""
        made = object.__new__(cls)
        for name, column in zip(COLUMNS, columns, strict=True):
            object.__setattr__(made, name, column)
        object.__setattr__(made, "ended", ended)
        object.__setattr__(made, "version", version)
        return made

    def drawn_by(self, version: int) -> Candidate:
        """The same numbers, with the version of the weights that drew them."""
        return Candidate.wrap(*self.columns(), ended=self.ended, version=version)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Candidate):
            return NotImplemented
        return self.ended == other.ended and all(
            len(mine) == len(theirs) and bool(((mine == theirs) | ((mine != mine) & (theirs != theirs))).all())
            for mine, theirs in zip(self.columns(), other.columns(), strict=True)
        )

    def __hash__(self) -> int:
        return hash((self.ids.tobytes(), self.ended))

    def __reduce__(self) -> tuple[Any, ...]:  # unpickled arrays could be written to
        return Candidate, (*self.columns(), self.ended, self.version)

    def columns(self) -> tuple[Any, ...]:
        """The per-token arrays, in the fields' order."""
        return tuple(getattr(self, name) for name in COLUMNS)


def _read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


@dataclass(frozen=True, slots=True)
class Uncertainty:
    """Eq 13's U and its weighted terms, which add up to ``total``; ``smoothed`` is the unweighted H~_n of eq 11.

    What is recorded and shown of a candidate follows from these fields: ``meaning`` describes the ledger's column, ``term`` is
    what the page calls a term. A term ``x`` has the weight ``erasure.x_weight``. New fields need a default and come last.
    """

    total: float = field(metadata={"meaning": "U (eq 13)"})
    base: float = field(metadata={"meaning": "weighted smoothed entropy in U", "term": "entropy"})
    gradient: float = field(metadata={"meaning": "weighted mean entropy step in U", "term": "entropy steps"})
    extremum: float = field(metadata={"meaning": "weighted extremum deviation in U", "term": "peak"})
    perturbation: float = field(metadata={"meaning": "weighted mean perturbation in U", "term": "perturbation"})
    smoothed: float = field(metadata={"meaning": "smoothed entropy (eq 11) without its weight"})


TERMS: Mapping[str, str] = {f.name: f.metadata["term"] for f in fields(Uncertainty) if "term" in f.metadata}
"""The terms of U by field, and what each is called."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """Eq 17's Theta = baseline * penalty * modulation."""

    total: float = field(metadata={"meaning": "Theta (eq 17)"})
    baseline: float = field(metadata={"meaning": "B_n (eq 16)"})
    penalty: float = field(metadata={"meaning": "Gamma (eq 17)"})
    modulation: float = field(metadata={"meaning": "phi (eq 18)"})


class Verdict(enum.StrEnum):
    """What the judge decides about a candidate (eq 24-25)."""

    COMMIT = "commit"
    ERASE = "erase"
    FORCED = "forced"  # above the threshold, but the erasure budget of this segment is spent
    SPARED = "spared"  # above the threshold, but committed by chance (`ErasureConfig.commit_anyway`)


@dataclass(frozen=True, slots=True)
class Judgement:
    """Why a candidate was committed or erased. ``attempt``: erasures of this segment before this candidate."""

    uncertainty: Uncertainty
    threshold: Threshold
    attempt: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class ToolResult:
    """A call that the model asked for: arguments as JSON, the result as the model sees it. ``failed``: the tool raised."""

    name: str
    arguments: str
    result: str
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Observed:
    """What an environment answered to an assistant turn. ``state``: turns in effect before it, its state's version.

    ``evidence`` against the turn, 0 to 1; ``forced``: kept in spite of it. ``seconds`` that the calls took are not stored.
    """

    calls: tuple[ToolResult, ...]
    state: int
    evidence: float = 0.0
    forced: bool = False
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Segment:
    """A committed candidate. ``judgement`` is None where nothing was judged: a plain rollout.

    With an ``observation`` its tokens are the environment's: not sampled, and not trained on.
    """

    index: int
    candidate: Candidate
    judgement: Judgement | None
    observation: Observed | None = None


@dataclass(frozen=True, slots=True)
class Erasure:
    """An erased candidate, kept for the report and for contrast. ``start``: response tokens before it.

    With an ``observation`` it is a whole assistant turn, all of its segments, erased after its results.
    """

    index: int
    start: int
    candidate: Candidate
    judgement: Judgement
    observation: Observed | None = None


@dataclass(frozen=True)
class Trajectory:
    """A prompt's response: its committed segments, and its erasures in order."""

    prompt: Prompt
    sibling: int
    segments: tuple[Segment, ...]
    erasures: tuple[Erasure, ...]
    finish: Literal["stop", "length"]
    failure: str | None = None
    """Why its environment could not go on: the reward is then missing."""
    environment: Any = field(default=None, compare=False, repr=False)
    """What the tools acted on, for rewards; None without tools, and for a trajectory that was read from a file."""

    @cached_property
    def ids(self) -> Ids:
        """Token ids of the response."""
        return self._joined("ids")

    @cached_property
    def logprobs(self) -> Numbers:
        """The engine's log-probability of each token of the response."""
        return self._joined("logprobs")

    @cached_property
    def entropies(self) -> Numbers:
        """The entropy at each token of the response."""
        return self._joined("entropies")

    def _joined(self, name: str) -> Any:
        """A per-token field of all segments together."""
        import numpy as np

        columns = [getattr(s.candidate, name) for s in self.segments]
        if len(columns) == 1:
            return columns[0]
        return _read_only(np.concatenate([np.empty(0, np.int32 if name in IDS else np.float64), *columns]))

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        return tuple(len(s.candidate.ids) for s in self.segments)

    @property
    def committed_tokens(self) -> int:
        """Tokens of committed segments that were drawn: observations do not count."""
        return sum(len(s.candidate.ids) for s in self.drawn_segments)

    @cached_property
    def drawn_segments(self) -> tuple[Segment, ...]:
        """The segments without observations."""
        return tuple(s for s in self.segments if s.observation is None)

    def drawn_index(self, index: int) -> int:
        """Drawn segments before the one at ``index``."""
        return index - sum(s.observation is not None for s in self.segments[:index])

    @property
    def turns(self) -> int:
        """Observations, and the assistant turn after the last."""
        return 1 + sum(s.observation is not None for s in self.segments)

    @cached_property
    def drawn_T(self) -> Any:
        """Which response tokens the model drew."""
        import numpy as np

        kinds = [np.full(len(s.candidate.ids), s.observation is None) for s in self.segments]
        return _read_only(np.concatenate([np.empty(0, bool), *kinds]))

    def context_of(self, place: int) -> list[int]:
        """The response tokens that the erasure at ``place`` was drawn after, including those of a turn that was erased later."""
        erasure = self.erasures[place]
        for later in self.erasures[place + 1 :]:
            if later.observation is not None and later.start <= erasure.start:
                before = self.ids[: later.start].tolist()
                return before + later.candidate.ids[: erasure.start - later.start].tolist()
        return self.ids[: erasure.start].tolist()

    @property
    def erased_tokens(self) -> int:
        return sum(len(e.candidate.ids) for e in self.erasures)


@dataclass(frozen=True, slots=True)
class Group:
    """All siblings of one prompt, by sibling number, and the policy version at their start (None: a demonstration)."""

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

    @property
    def right(self) -> bool | None:
        """Whether the answer is right: the first reward function gave at least 1, whatever others add. None: it gave nothing."""
        first = next(iter(self.parts.values()), None)
        return None if first is None else first >= 1


@dataclass(frozen=True, slots=True)
class RewardedGroup:
    """A group and its trajectories' rewards, in the same order."""

    group: Group
    rewards: tuple[Reward, ...]
