"""The rollout ledger: every trajectory with all that was erased on the way, one Parquet file a step.

`SCHEMA` is the format's definition; its field metadata says what each column holds, and docs/run-directory.md is
generated from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from e3rl.files import atomic_file
from e3rl.train.pieces import Pieces
from e3rl.types import Candidate, Judgement, RewardedGroup, Trajectory

if TYPE_CHECKING:
    from e3rl.train.learner import Lesson

FORMAT = 1


def _field(name: str, kind: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, kind, metadata={"meaning": meaning})


_FLOATS, _INTS = pa.list_(pa.float32()), pa.list_(pa.int32())

_JUDGED = [
    _field("attempt", pa.int32(), "erasures of this segment before this candidate; null where nothing was judged"),
    _field("verdict", pa.string(), "commit, erase or forced; null where nothing was judged"),
    _field("uncertainty", pa.float64(), "U (eq 13)"),
    _field("base", pa.float64(), "weighted smoothed entropy in U"),
    _field("gradient", pa.float64(), "weighted mean entropy step in U"),
    _field("extremum", pa.float64(), "weighted extremum deviation in U"),
    _field("perturbation", pa.float64(), "weighted mean perturbation in U"),
    _field("threshold", pa.float64(), "Theta (eq 17)"),
    _field("baseline", pa.float64(), "B_n (eq 16)"),
    _field("penalty", pa.float64(), "Gamma (eq 17)"),
    _field("modulation", pa.float64(), "phi (eq 18)"),
]

_CANDIDATE = [
    _field("index", pa.int32(), "segment index, from 0"),
    _field("start", pa.int32(), "committed response tokens before it"),
    _field("text", pa.string(), "its text"),
    _field("ids", _INTS, "its token ids"),
    _field("pieces", pa.list_(pa.string()), "the text of each token; together they are the text"),
    _field("logprobs", _FLOATS, "engine's log-probability of each token, temperature-scaled, untruncated"),
    _field(
        "entropies",
        _FLOATS,
        "full-vocabulary entropy at each token, nats, at erasure.entropy_temperature where that is set",
    ),
    _field("perturbations", _FLOATS, "eq 5 at each token, at the same temperature"),
    _field(
        "ranks", _INTS, "one more than the tokens that were likelier: 1 is the likeliest; 0 where nothing was drawn"
    ),
    *_JUDGED,
]

SCHEMA = pa.schema(
    [
        _field("step", pa.int32(), "training step that the rollout was made for, from 1"),
        _field("problem_id", pa.string(), "id of the problem"),
        _field("sibling", pa.int32(), "which of the group's samples, from 0"),
        _field(
            "policy_version",
            pa.int32(),
            "optimizer updates behind the weights that generated it; null: a demonstration",
        ),
        _field("prompt", pa.string(), "the prompt as the model saw it"),
        _field("answer", pa.string(), "reference answer"),
        _field("response", pa.string(), "text of the committed segments"),
        _field("finish", pa.string(), "'stop' (end of sequence) or 'length'"),
        _field("reward", pa.float64(), "reward; null where it is missing"),
        _field("reward_parts", pa.map_(pa.string(), pa.float64()), "each reward function's own value"),
        _field("reward_error", pa.string(), "why the reward is missing"),
        _field("advantages", _FLOATS, "advantage of each response token; empty where it was not trained on"),
        _field("shares", _FLOATS, "share of the final attention on each response token (eq 19); null where unused"),
        _field(
            "erased_advantages",
            _FLOATS,
            "advantage of each erased candidate, in the order of erasures; empty where they were not trained on",
        ),
        _field("segments", pa.list_(pa.struct(_CANDIDATE)), "committed segments, in order"),
        _field("erasures", pa.list_(pa.struct(_CANDIDATE)), "erased candidates, in the order they were erased"),
    ],
    metadata={"format": str(FORMAT)},
)


def _judged(judgement: Judgement | None) -> dict[str, Any]:
    if judgement is None:
        return {field.name: None for field in _JUDGED}
    u, theta = judgement.uncertainty, judgement.threshold
    return {
        "attempt": judgement.attempt,
        "verdict": judgement.verdict.value,
        "uncertainty": u.total,
        "base": u.base,
        "gradient": u.gradient,
        "extremum": u.extremum,
        "perturbation": u.perturbation,
        "threshold": theta.total,
        "baseline": theta.baseline,
        "penalty": theta.penalty,
        "modulation": theta.modulation,
    }


def _candidate(
    index: int, start: int, candidate: Candidate, judgement: Judgement | None, pieces: Pieces
) -> dict[str, Any]:
    return {
        "index": index,
        "start": start,
        "text": pieces.decode(candidate.ids.tolist()),
        "ids": candidate.ids.tolist(),
        "pieces": pieces.split(candidate.ids.tolist()),
        "logprobs": candidate.logprobs.tolist(),
        "entropies": candidate.entropies.tolist(),
        "perturbations": candidate.perturbations.tolist(),
        "ranks": candidate.ranks.tolist(),
        **_judged(judgement),
    }


def response_columns(trajectory: Trajectory, pieces: Pieces) -> dict[str, Any]:
    """The columns of a row that say what was generated: they need no reward."""
    segments, start = [], 0
    for segment in trajectory.segments:
        segments.append(_candidate(segment.index, start, segment.candidate, segment.judgement, pieces))
        start += len(segment.candidate.ids)
    return {
        "sibling": trajectory.sibling,
        "prompt": pieces.decode(trajectory.prompt.ids),
        "answer": trajectory.prompt.problem.answer,
        "response": pieces.decode(trajectory.ids.tolist()),
        "finish": trajectory.finish,
        "segments": segments,
        "erasures": [_candidate(e.index, e.start, e.candidate, e.judgement, pieces) for e in trajectory.erasures],
    }


@dataclass(frozen=True)
class Learnt:
    """What a trajectory was trained with. The defaults are those of one that was not."""

    advantages: tuple[float, ...] = ()
    shares: tuple[float, ...] | None = None
    erased_advantages: tuple[float, ...] = ()


def learnt(rewarded: Sequence[RewardedGroup], lessons: Sequence[Lesson]) -> list[list[Learnt]]:
    """By group and sibling."""
    by_place: dict[tuple[int, int], list[Lesson]] = {}
    for lesson in lessons:
        by_place.setdefault((lesson.sequence.group, lesson.sequence.sibling), []).append(lesson)
    return [
        [_learnt(by_place.get((group, t.sibling), [])) for t in item.group.trajectories]
        for group, item in enumerate(rewarded)
    ]


def _learnt(lessons: Sequence[Lesson]) -> Learnt:
    """The lessons of one trajectory: its own, then those of its erased candidates."""
    if not lessons:
        return Learnt()
    own, *erased = lessons
    shares_T = own.scores.shares_T
    return Learnt(
        tuple(own.advantages_T.tolist()),
        None if shares_T is None else tuple(shares_T.tolist()),
        tuple(float(x.advantages_T[-1]) for x in erased),  # the same for all its tokens, which come last
    )


def ledger_rows(
    step: int, rewarded: Sequence[RewardedGroup], signals: Sequence[Sequence[Learnt]], tokenizer: Any
) -> list[dict[str, Any]]:
    """One row a trajectory; ``signals`` by group and sibling."""
    pieces = Pieces(tokenizer)
    rows = []
    for item, group_signals in zip(rewarded, signals, strict=True):
        group = item.group
        for trajectory, reward, signal in zip(group.trajectories, item.rewards, group_signals, strict=True):
            rows.append(
                {
                    "step": step,
                    "problem_id": group.prompt.problem.id,
                    "policy_version": group.policy_version,
                    "reward": reward.value,
                    "reward_parts": list(reward.parts.items()),
                    "reward_error": reward.error,
                    "advantages": signal.advantages,
                    "shares": signal.shares,
                    "erased_advantages": signal.erased_advantages,
                    **response_columns(trajectory, pieces),
                }
            )
    return rows


def ledger_path(run: Path, step: int) -> Path:
    return run / "rollouts" / f"step-{step:06d}.parquet"


def write_ledger(run: Path, step: int, rows: list[dict[str, Any]]) -> None:
    """Write one step's rollouts atomically."""
    with atomic_file(ledger_path(run, step)) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary, compression="zstd")
