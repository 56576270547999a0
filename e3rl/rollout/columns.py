"""Groups as Arrow record batches: the one encoding of rollouts on the wire and on disk.

`SCHEMA` has a row for each trajectory. Rollout workers answer with it, the journal appends it, a checkpoint's prefetched groups
and a skipped step's batch are files of it, and the ledger (`e3rl.train.ledger`) is it with the text and what was learnt beside.
Per-token numbers are float32 and int32 columns: encoding and decoding are copies in C, with no Python for each token.

What comes from outside goes through `e3rl.rollout.ipc`, which lets nothing pass but this schema, whole and consistent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import accumulate, chain, pairwise
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa

from e3rl.environments.protocol import RemoteEnvironment
from e3rl.rollout.turns import from_json, to_json
from e3rl.types import (
    COLUMNS,
    IDS,
    Candidate,
    Draw,
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
    ("verdict", pa.string(), "commit, erase, forced or spared; null where nothing was judged"),
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
_REWARD = ("reward", "reward_parts", "reward_error")
NUMBERS = [name for name, kind, _ in _CANDIDATE if kind == pa.float64()]
"""The fields of `Uncertainty` and then of `Threshold`, in order."""
_U, _THETA = (attrgetter(*(f.name for f in fields(kind))) for kind in (Uncertainty, Threshold))
_U_SIZE = len(fields(Uncertainty))

_ENVIRONMENT, _FAILED = "environment", "its environment "
"""The reward part, and the start of the error, that stand for a trajectory's `RemoteEnvironment` before it has a reward."""

Record = tuple[int, int, Candidate, int | None, Judgement | None, Observed | None]
"""A candidate as it is read: index, start, candidate, attempt, judgement, observation."""


def encode(groups: Iterable[Group | RewardedGroup]) -> pa.RecordBatch:
    """The groups' trajectories, a row each, siblings one after the other."""
    items = [item if isinstance(item, RewardedGroup) else RewardedGroup(item, ()) for item in groups]
    rows = [(item.group, t) for item in items for t in item.group.trajectories]
    rewards = [r for item in items for r in item.rewards or map(_outcome, item.group.trajectories)]
    trajectories = [t for _, t in rows]
    starts = [start for t in trajectories for start in [*accumulate(t.segment_lengths, initial=0)][:-1]]
    return _batch(
        len(rows),
        problem_id=[group.prompt.problem.id for group, _ in rows],
        sibling=[t.sibling for t in trajectories],
        policy_version=[group.policy_version for group, _ in rows],
        prompt_ids=_prompts([np.array(i.group.prompt.ids, np.int32) for i in items for _ in i.group.trajectories]),
        finish=[t.finish for t in trajectories],
        **_rewards(rewards),
        segments=_lists([t.segments for t in trajectories], starts),
        erasures=_lists([t.erasures for t in trajectories], [e.start for t in trajectories for e in t.erasures]),
    )


def _outcome(t: Trajectory) -> Reward | None:
    """What is known of the environment of a trajectory without a reward."""
    known = {_ENVIRONMENT: t.environment.reward} if isinstance(t.environment, RemoteEnvironment) else {}
    failed = None if t.failure is None else f"{_FAILED}{t.failure}"
    return Reward(None, known, failed) if known or failed else None


def encode_drawn(drawn: Sequence[tuple[Draw, Candidate]]) -> pa.RecordBatch:
    """Candidates of responses that are not complete, a row each. Seed and step of their draws are not kept."""
    draws, rows = [draw for draw, _ in drawn], len(drawn)
    numbers = {"index": [draw.segment for draw in draws], "start": [0] * rows, "attempt": [d.attempt for d in draws]}
    return _batch(
        rows,
        problem_id=[draw.prompt_id for draw in draws],
        sibling=[draw.sibling for draw in draws],
        prompt_ids=_prompts([np.empty(0, np.int32)] * rows),
        segments=pa.ListArray.from_arrays(_offsets([1] * rows), _struct([c for _, c in drawn], numbers)),
        erasures=_lists([()] * rows, []),
    )


def _batch(rows: int, **columns: Any) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([_array(columns.get(f.name), f, rows) for f in SCHEMA], schema=SCHEMA)


def _struct(candidates: Sequence[Candidate], columns: Mapping[str, Any]) -> pa.StructArray:
    """Candidates as `CANDIDATE`, with columns of their places and judgements."""
    own = {"ended": [bool(c.ended) for c in candidates], "version": [c.version for c in candidates]}
    found = {**columns, **own, **_tokens(candidates)}
    return pa.StructArray.from_arrays([_array(found.get(f.name), f, len(candidates)) for f in _FIELDS], fields=_FIELDS)


def _array(values: Any, field: pa.Field, size: int) -> pa.Array:
    """A column; null where there are no values."""
    if values is None:
        return pa.nulls(size, field.type)
    return values if isinstance(values, pa.Array) else pa.array(values, field.type)


def _offsets(sizes: Sequence[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *sizes], dtype=np.int32))


def _prompts(prompts: Sequence[np.ndarray]) -> pa.ListArray:
    ids = np.concatenate([np.empty(0, np.int32), *prompts])
    return pa.ListArray.from_arrays(_offsets([len(prompt) for prompt in prompts]), pa.array(ids))


def _rewards(rewards: Sequence[Reward | None]) -> dict[str, list]:
    if all(r is None for r in rewards):
        return {}
    errors = [None if r is None or r.error is None else r.error.encode("utf-8", "replace").decode() for r in rewards]
    parts = [None if r is None else list(r.parts.items()) for r in rewards]
    return dict(zip(_REWARD, ([None if r is None else r.value for r in rewards], parts, errors), strict=True))


def _lists(rows: Sequence[Sequence[Segment] | Sequence[Erasure]], starts: Sequence[int]) -> pa.ListArray:
    """The candidates of each row, as a list of `CANDIDATE`; ``starts`` of all."""
    records: list[Segment | Erasure] = list(chain.from_iterable(rows))
    judgements = [r.judgement for r in records]
    columns = {
        "index": [r.index for r in records],
        "start": starts,
        "observation": [r.observation and to_json(r.observation) for r in records],
        "attempt": [None if j is None else j.attempt for j in judgements],
        **_judgements(judgements),
    }
    return pa.ListArray.from_arrays(
        _offsets([len(row) for row in rows]), _struct([r.candidate for r in records], columns)
    )


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
        return {}
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


def decode(batch: pa.RecordBatch, prompt_of: Callable[[str, np.ndarray], Prompt]) -> list[RewardedGroup]:
    """The groups of a batch with their rewards, which are missing where they are in the batch.

    ``prompt_of`` makes a group's prompt of its problem's id and token ids. Per-token arrays are views of one buffer. ValueError
    where a row is no complete response.
    """
    ids, siblings = batch["problem_id"].to_pylist(), batch["sibling"].to_pylist()
    new = [n == 0 or ids[n] != ids[n - 1] or siblings[n] <= siblings[n - 1] for n in range(batch.num_rows)]
    firsts = [n for n, first in enumerate(new) if first]
    segments, erasures = (_records(batch[name]) for name in ("segments", "erasures"))
    versions, finish = (batch[name].to_pylist() for name in ("policy_version", "finish"))
    rewards, prompts = _read_rewards(batch), batch["prompt_ids"]
    groups = []
    for first, end in pairwise([*firsts, batch.num_rows]):
        prompt = prompt_of(ids[first], prompts[first].values.to_numpy())
        trajectories = tuple(
            _trajectory(prompt, siblings[n], finish[n], segments[n], erasures[n], rewards[n]) for n in range(first, end)
        )
        groups.append(RewardedGroup(Group(prompt, trajectories, versions[first]), tuple(rewards[first:end])))
    return groups


def decode_drawn(batch: pa.RecordBatch, seed: int, step: int) -> list[tuple[Draw, Candidate]]:
    """What `encode_drawn` was given; ValueError where the batch can't have come from it."""
    found = []
    names = zip(batch["problem_id"].to_pylist(), batch["sibling"].to_pylist(), strict=True)
    for (problem_id, sibling), records in zip(names, _records(batch["segments"]), strict=True):
        [(index, _, candidate, attempt, _, _)] = records
        if attempt is None:
            raise ValueError("a candidate without its attempt")
        found.append((Draw(seed, step, problem_id, sibling, index, attempt), candidate))
    return found


def _trajectory(
    prompt: Prompt, sibling: int, finish: Any, segments: Sequence[Record], erasures: Sequence[Record], reward: Reward
) -> Trajectory:
    if finish is None:
        raise ValueError(f"problem '{prompt.problem.id}': a response that is not complete")
    committed = tuple(
        Segment(index, candidate, judgement, seen) for index, _, candidate, _, judgement, seen in segments
    )
    erased = []
    for index, start, candidate, _, judgement, seen in erasures:
        if judgement is None:
            raise ValueError(f"problem '{prompt.problem.id}': an erased candidate without a judgement")
        erased.append(Erasure(index, start, candidate, judgement, seen))
    failure = reward.error.removeprefix(_FAILED) if reward.error and reward.error.startswith(_FAILED) else None
    environment = RemoteEnvironment(reward.parts[_ENVIRONMENT]) if _ENVIRONMENT in reward.parts else None
    return Trajectory(prompt, sibling, committed, tuple(erased), finish, failure, environment)


def _read_rewards(batch: pa.RecordBatch) -> list[Reward]:
    columns = (batch[name].to_pylist() for name in _REWARD)
    return [
        Reward(None, {}) if parts is None else Reward(value, dict(parts), error)
        for value, parts, error in zip(*columns, strict=True)
    ]


def _records(lists: pa.ListArray) -> list[list[Record]]:
    """The candidates of each row."""
    struct, bounds = lists.values, lists.offsets.to_pylist()
    tokens = _arrays(struct)
    places = struct.field("ids").offsets.to_pylist()
    names = ("index", "start", "ended", "version", "observation", "attempt", "verdict")
    plain = zip(*(struct.field(name).to_pylist() for name in names), strict=True)
    numbers = np.array([struct.field(n).to_numpy(zero_copy_only=False) for n in NUMBERS]).T.tolist()
    found = list[Record]()
    for n, (index, start, ended, version, seen, attempt, verdict) in enumerate(plain):
        here = slice(places[n], places[n + 1])
        candidate = Candidate.wrap(*(column[here] for column in tokens), ended=ended, version=version)
        judgement = None
        if verdict is not None:
            u, theta = Uncertainty(*numbers[n][:_U_SIZE]), Threshold(*numbers[n][_U_SIZE:])
            judgement = Judgement(u, theta, attempt, Verdict(verdict))
        found.append((index, start, candidate, attempt, judgement, None if seen is None else from_json(seen)))
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
