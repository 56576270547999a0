"""Groups as Arrow record batches: the one encoding of rollouts on the wire and on disk.

`SCHEMA` has a row for each trajectory. Rollout workers answer with it, the journal appends it, a checkpoint's prefetched groups
and a skipped step's batch are files of it, and the ledger (`e3rl.train.ledger`) is it with the text and what was learnt beside.
Per-token numbers are float32 and int32 columns: encoding and decoding are copies in C, with no Python for each token.

What comes from outside goes through `e3rl.rollout.ipc`, which lets nothing pass but this schema, whole and consistent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain, pairwise
from operator import attrgetter
from typing import Literal

import numpy as np
import pyarrow as pa

from e3rl.rollout.turns import from_json, to_json
from e3rl.types import (
    COLUMNS,
    IDS,
    Candidate,
    Erasure,
    Group,
    Judgement,
    Observed,
    Prompt,
    Reward,
    RewardedGroup,
    Segment,
    Threshold,
    Trajectory,
    Uncertainty,
    Verdict,
)

_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())


def _numbers_of(kind: type[Uncertainty | Threshold], total: str) -> list[tuple[str, pa.DataType, str]]:
    """A column for each field; the field ``total`` has a column of another name."""
    return [(total if f.name == "total" else f.name, pa.float64(), f.metadata["meaning"]) for f in fields(kind)]


_CANDIDATE = [
    ("index", pa.int32(), "segment index, from 0"),
    ("start", pa.int32(), "committed response tokens before it"),
    ("ids", _INTS, "its token ids"),
    ("logprobs", _FLOATS, "engine's log-probability of each token, temperature-scaled, untruncated"),
    (
        "entropies",
        _FLOATS,
        "full-vocabulary entropy at each token, nats, at erasure.entropy_temperature where that is set",
    ),
    ("perturbations", _FLOATS, "eq 5 at each token, at the same temperature"),
    ("kept_mass", _FLOATS, "share of the distribution that top-k and top-p left to draw each token from"),
    ("ranks", _INTS, "one more than the tokens that were likelier: 1 is the likeliest; 0 where nothing was drawn"),
    ("ended", pa.bool_(), "its last token ends the sequence"),
    ("version", pa.int32(), "optimizer updates behind the weights that drew it; null where none did"),
    (
        "observation",
        pa.string(),
        "JSON: an environment's calls, their results, its state's version and what they say against the turn. "
        "Of a segment: its tokens are the environment's; of an erasure: a whole turn that was erased after them; else null",
    ),
    ("attempt", pa.int32(), "erasures of this segment before this candidate; null where nothing was judged"),
    ("verdict", pa.string(), "commit, erase or forced; null where nothing was judged"),
    *_numbers_of(Uncertainty, "uncertainty"),
    *_numbers_of(Threshold, "threshold"),
]
CANDIDATE = pa.struct([(name, kind) for name, kind, _ in _CANDIDATE])
_FIELDS = list(CANDIDATE)
_TRAJECTORY = [
    ("problem_id", pa.string(), "id of the problem"),
    ("sibling", pa.int32(), "which of the group's samples, from 0"),
    (
        "policy_version",
        pa.int32(),
        "optimizer updates behind the weights that it was begun with; null: a demonstration",
    ),
    ("prompt_ids", _INTS, "token ids of the prompt"),
    ("finish", pa.string(), "'stop' (end of sequence) or 'length'"),
    ("reward", pa.float64(), "reward; null where it is missing"),
    ("reward_parts", pa.map_(pa.string(), pa.float64()), "each reward function's own value"),
    ("reward_error", pa.string(), "why the reward is missing"),
    ("segments", pa.list_(CANDIDATE), "committed segments, in order"),
    ("erasures", pa.list_(CANDIDATE), "erased candidates, in the order they were erased"),
]
SCHEMA = pa.schema([(name, kind) for name, kind, _ in _TRAJECTORY])
MEANING = {name: meaning for name, _, meaning in (*_TRAJECTORY, *_CANDIDATE)}
"""What each column holds, those of a candidate included."""
_HEAD = ("problem_id", "sibling", "policy_version", "finish")
NUMBERS = [name for name, kind, _ in _CANDIDATE if kind == pa.float64()]
"""The fields of `Uncertainty` and then of `Threshold`, in order."""
_U, _THETA = (attrgetter(*(f.name for f in fields(kind))) for kind in (Uncertainty, Threshold))
_U_SIZE = len(fields(Uncertainty))


@dataclass(frozen=True, slots=True)
class CandidateRecord:
    """A candidate in its place: `Segment` and `Erasure` in one. ``attempt`` may be known where nothing was judged."""

    index: int
    start: int
    candidate: Candidate
    attempt: int | None
    judgement: Judgement | None
    observation: Observed | None = None


@dataclass(frozen=True, slots=True)
class TrajectoryRow:
    """A row of `SCHEMA`. ``finish`` is None where the response is not complete: candidates that a journal keeps."""

    problem_id: str
    sibling: int
    policy_version: int | None
    prompt_ids: Sequence[int] | np.ndarray
    finish: Literal["stop", "length"] | None
    segments: Sequence[CandidateRecord]
    erasures: Sequence[CandidateRecord] = ()
    reward: Reward | None = None


def encode(groups: Iterable[Group | RewardedGroup]) -> pa.RecordBatch:
    """The groups' trajectories, a row each, siblings one after the other."""
    return encode_rows(list(chain.from_iterable(map(_rows, groups))))


def _rows(item: Group | RewardedGroup) -> Iterator[TrajectoryRow]:
    group, rewards = (item.group, item.rewards) if isinstance(item, RewardedGroup) else (item, None)
    prompt_ids = np.array(group.prompt.ids, np.int32)
    for number, t in enumerate(group.trajectories):
        starts = np.cumsum([0, *t.segment_lengths]).tolist()
        segments = [_record(s, start) for s, start in zip(t.segments, starts[:-1], strict=True)]
        erasures = [_record(e, e.start) for e in t.erasures]
        reward = None if rewards is None else rewards[number]
        version = group.policy_version
        yield TrajectoryRow(
            group.prompt.problem.id, t.sibling, version, prompt_ids, t.finish, segments, erasures, reward
        )


def _record(record: Segment | Erasure, start: int) -> CandidateRecord:
    judgement = record.judgement
    attempt = None if judgement is None else judgement.attempt
    return CandidateRecord(record.index, start, record.candidate, attempt, judgement, record.observation)


def encode_rows(rows: Sequence[TrajectoryRow]) -> pa.RecordBatch:
    """A record batch of these rows."""
    columns = {
        "problem_id": [row.problem_id for row in rows],
        "sibling": [row.sibling for row in rows],
        "policy_version": [row.policy_version for row in rows],
        "prompt_ids": _prompts([row.prompt_ids for row in rows]),
        "finish": [row.finish for row in rows],
        **_rewards([row.reward for row in rows]),
        "segments": _candidates([row.segments for row in rows]),
        "erasures": _candidates([row.erasures for row in rows]),
    }
    arrays = [
        c if isinstance(c, pa.Array) else pa.array(c, f.type) for f, c in zip(SCHEMA, columns.values(), strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _offsets(sizes: Sequence[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *sizes], dtype=np.int32))


def _prompts(prompts: Sequence[Sequence[int] | np.ndarray]) -> pa.ListArray:
    ids = np.concatenate([np.empty(0, np.int32), *(np.asarray(prompt, np.int32) for prompt in prompts)])
    return pa.ListArray.from_arrays(_offsets([len(prompt) for prompt in prompts]), pa.array(ids))


def _rewards(rewards: Sequence[Reward | None]) -> dict[str, pa.Array | list]:
    names = ("reward", "reward_parts", "reward_error")
    if all(r is None for r in rewards):
        return {name: pa.nulls(len(rewards), SCHEMA.field(name).type) for name in names}
    errors = [None if r is None or r.error is None else r.error.encode("utf-8", "replace").decode() for r in rewards]
    parts = [None if r is None else list(r.parts.items()) for r in rewards]
    return dict(zip(names, ([None if r is None else r.value for r in rewards], parts, errors), strict=True))


def _candidates(rows: Sequence[Sequence[CandidateRecord]]) -> pa.ListArray:
    """The records of each row, as a list of `CANDIDATE`."""
    records = list(chain.from_iterable(rows))
    columns = {
        "index": pa.array([r.index for r in records], pa.int32()),
        "start": pa.array([r.start for r in records], pa.int32()),
        **_tokens([r.candidate for r in records]),
        "ended": pa.array([bool(r.candidate.ended) for r in records], pa.bool_()),
        "version": pa.array([r.candidate.version for r in records], pa.int32()),
        "observation": pa.array([r.observation and to_json(r.observation) for r in records], pa.string()),
        "attempt": pa.array([r.attempt for r in records], pa.int32()),
        **_judgements([r.judgement for r in records]),
    }
    struct = pa.StructArray.from_arrays(list(columns.values()), fields=_FIELDS)
    return pa.ListArray.from_arrays(_offsets([len(row) for row in rows]), struct)


def _tokens(candidates: Sequence[Candidate]) -> dict[str, pa.ListArray]:
    """The per-token columns. They share their offsets."""
    offsets, found = _offsets([len(c.ids) for c in candidates]), {}
    for name in COLUMNS:
        kind = np.int32 if name in IDS else np.float32
        values = [getattr(c, name) for c in candidates]
        joined = np.concatenate(values, dtype=kind, casting="same_kind") if values else np.empty(0, kind)
        found[name] = pa.ListArray.from_arrays(offsets, pa.array(joined))
    return found


def _judgements(judgements: Sequence[Judgement | None]) -> dict[str, pa.Array]:
    """The columns that are null where nothing was judged."""
    unjudged = np.array([j is None for j in judgements], bool)
    if unjudged.all():
        numbers = dict.fromkeys(NUMBERS, pa.nulls(len(judgements), pa.float64()))
        return {"verdict": pa.nulls(len(judgements), pa.string()), **numbers}
    verdicts = pa.array([None if j is None else j.verdict.value for j in judgements], pa.string())
    table = np.array([_numbers(j) for j in judgements], np.float64).T
    return {
        "verdict": verdicts,
        **{n: pa.array(c, mask=unjudged, from_pandas=False) for n, c in zip(NUMBERS, table, strict=True)},
    }


def _numbers(judgement: Judgement | None) -> tuple[float, ...]:
    if judgement is None:
        return (0.0,) * len(NUMBERS)
    return (*_U(judgement.uncertainty), *_THETA(judgement.threshold))


def decode_rows(batch: pa.RecordBatch) -> list[TrajectoryRow]:
    """The rows of a batch. ValueError where one can't have come from `encode_rows`; per-token arrays are views of one buffer."""
    plain = {name: batch[name].to_pylist() for name in (*_HEAD, "reward", "reward_parts", "reward_error")}
    prompts, segments, erasures = batch["prompt_ids"], *(_records(batch[name]) for name in ("segments", "erasures"))
    offsets, ids = prompts.offsets.to_pylist(), prompts.values.to_numpy()
    rows = []
    for n in range(batch.num_rows):
        value, parts, error = (plain[name][n] for name in ("reward", "reward_parts", "reward_error"))
        reward = None if parts is None else Reward(value, dict(parts), error)
        problem_id, sibling, version, finish = (plain[name][n] for name in _HEAD)
        prompt_ids = ids[offsets[n] : offsets[n + 1]]
        rows.append(TrajectoryRow(problem_id, sibling, version, prompt_ids, finish, segments[n], erasures[n], reward))
    return rows


def _records(lists: pa.ListArray) -> list[list[CandidateRecord]]:
    """The records of each row."""
    struct, bounds = lists.values, lists.offsets.to_pylist()
    tokens = _arrays(struct)
    places = struct.field("ids").offsets.to_pylist()
    plain = {
        n: struct.field(n).to_pylist()
        for n in ("index", "start", "ended", "version", "observation", "attempt", "verdict")
    }
    numbers = np.array([struct.field(n).to_numpy(zero_copy_only=False) for n in NUMBERS]).T.tolist()
    found = []
    for n in range(len(struct)):
        here = slice(places[n], places[n + 1])
        beside = {name: plain[name][n] for name in ("ended", "version")}
        candidate = Candidate.wrap(*(column[here] for column in tokens), **beside)
        attempt, verdict = plain["attempt"][n], plain["verdict"][n]
        judgement = None
        if verdict is not None:
            terms, factors = numbers[n][:_U_SIZE], numbers[n][_U_SIZE:]
            judgement = Judgement(Uncertainty(*terms), Threshold(*factors), attempt, Verdict(verdict))
        seen = plain["observation"][n]
        observation = None if seen is None else from_json(seen)
        found.append(CandidateRecord(plain["index"][n], plain["start"][n], candidate, attempt, judgement, observation))
    return [found[a:b] for a, b in pairwise(bounds)]


def _arrays(struct: pa.StructArray) -> list[np.ndarray]:
    """The per-token columns of all candidates, in the order of `COLUMNS` and the types of `Candidate`."""
    columns = []
    for name in COLUMNS:
        values = struct.field(name).values.to_numpy()
        column = values.astype(np.int32 if name in IDS else np.float64)
        column.flags.writeable = False
        columns.append(column)
    return columns


def decode(batch: pa.RecordBatch, prompt_of: Callable[[TrajectoryRow], Prompt]) -> list[RewardedGroup]:
    """The groups of a batch with their rewards, which are missing where they are in the batch. ValueError where a row is no
    complete response."""
    groups: list[list[TrajectoryRow]] = []
    for row in decode_rows(batch):
        if groups and groups[-1][-1].problem_id == row.problem_id and groups[-1][-1].sibling < row.sibling:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [_group(rows, prompt_of(rows[0])) for rows in groups]


def _group(rows: Sequence[TrajectoryRow], prompt: Prompt) -> RewardedGroup:
    trajectories = []
    for row in rows:
        if row.finish is None:
            raise ValueError(f"problem '{row.problem_id}': a response that is not complete")
        if any(r.judgement is None for r in row.erasures):
            raise ValueError(f"problem '{row.problem_id}': an erased candidate without a judgement")
        segments = tuple(Segment(r.index, r.candidate, r.judgement, r.observation) for r in row.segments)
        erasures = tuple(
            Erasure(r.index, r.start, r.candidate, r.judgement, r.observation) for r in row.erasures if r.judgement
        )
        trajectories.append(Trajectory(prompt, row.sibling, segments, erasures, row.finish))
    rewards = tuple(row.reward or Reward(None, {}) for row in rows)
    return RewardedGroup(Group(prompt, tuple(trajectories), rows[0].policy_version), rewards)
