"""The rollout ledger: every trajectory with all that was erased on the way, one Parquet file a step.

It is `e3rl.rollout.columns.SCHEMA` with the text of everything, and what the trajectories were trained with. `SCHEMA` here is the
file format's definition; its field metadata says what each column holds, and docs/run-directory.md is generated from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from e3rl.data.pieces import Pieces, pieces_of
from e3rl.errors import UserError
from e3rl.files import atomic_file
from e3rl.rollout import columns
from e3rl.types import Group, RewardedGroup, Trajectory

if TYPE_CHECKING:
    from e3rl.train.lessons import Lesson

FORMAT = 3
READABLE = ("1", "2", "3")
"""Formats that the report and the doctor read: earlier ones lack columns that they don't need."""

_TEXTS = pa.list_(pa.string())
_MEANING = {
    **columns.MEANING,
    "text": "its text",
    "pieces": "the text of each token; together they are the text",
    "step": "training step that the rollout was made for, from 1",
    "prompt": "the prompt as the model saw it",
    "answer": "reference answer",
    "response": "text of the committed segments",
    "advantages": "advantage of each response token; empty where it was not trained on",
    "shares": "share of the final attention on each response token (eq 19); null where unused",
    "erased_advantages": "advantage of each erased candidate, in the order of erasures; empty where they were not trained on",
}


def _field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, metadata={"meaning": _MEANING[name]})


_CANDIDATE = pa.struct(
    [_field(f.name, f.type) for f in (*columns.CANDIDATE, pa.field("text", pa.string()), pa.field("pieces", _TEXTS))]
)
_FLOATS = pa.list_(pa.float32())
_BESIDE = {"segments": pa.list_(_CANDIDATE), "erasures": pa.list_(_CANDIDATE)}
_WITH_TEXT = [
    ("prompt", pa.string()),
    ("answer", pa.string()),
    ("response", pa.string()),
    *((f.name, _BESIDE.get(f.name, f.type)) for f in columns.SCHEMA),
]
_LEARNT = [("advantages", _FLOATS), ("shares", _FLOATS), ("erased_advantages", _FLOATS)]

SCHEMA = pa.schema(
    [_field(name, kind) for name, kind in (("step", pa.int32()), *_WITH_TEXT, *_LEARNT)],
    metadata={"format": str(FORMAT)},
)


def _with_text(groups: Sequence[Group | RewardedGroup], pieces: Pieces) -> dict[str, pa.Array]:
    """The columns of `columns.SCHEMA` and the text that belongs to them."""
    batch = columns.encode(groups)
    found = {name: batch[name] for name in batch.schema.names}
    for name in _BESIDE:
        found[name] = _candidates_with_text(batch[name], pieces)
    plain = [item.group if isinstance(item, RewardedGroup) else item for item in groups]
    prompts = [pieces.decode(group.prompt.ids) for group in plain]
    trajectories = [(t, prompt) for group, prompt in zip(plain, prompts, strict=True) for t in group.trajectories]
    found["prompt"] = pa.array([prompt for _, prompt in trajectories], pa.string())
    found["answer"] = pa.array([t.prompt.problem.answer for t, _ in trajectories], pa.string())
    found["response"] = pa.array([pieces.decode(t.ids.tolist()) for t, _ in trajectories], pa.string())
    return found


def _candidates_with_text(lists: pa.ListArray, pieces: Pieces) -> pa.ListArray:
    struct = lists.values
    ids = struct.field("ids")
    texts, each = pieces.columns(ids.values.to_numpy(), ids.offsets.to_numpy())
    arrays = [*(struct.field(f.name) for f in columns.CANDIDATE), texts, pa.ListArray.from_arrays(ids.offsets, each)]
    return pa.ListArray.from_arrays(lists.offsets, pa.StructArray.from_arrays(arrays, fields=list(_CANDIDATE)))


def response_columns(trajectory: Trajectory, pieces: Pieces) -> dict[str, Any]:
    """The columns of a row that say what was generated: they need no reward."""
    group = Group(trajectory.prompt, (trajectory,), None)
    names = ("sibling", "prompt", "answer", "response", "finish", "segments", "erasures")
    found = _with_text([group], pieces)
    return {name: found[name][0].as_py() for name in names}


@dataclass(frozen=True)
class Learnt:
    """What a trajectory was trained with. The defaults are those of one that was not."""

    advantages: Sequence[float] | np.ndarray = ()
    shares: Sequence[float] | np.ndarray | None = None
    erased_advantages: Sequence[float] | np.ndarray = ()


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
        own.advantages_T.numpy(),
        None if shares_T is None else shares_T.numpy(),
        [float(x.advantages_T[-1]) for x in erased],  # the same for all its tokens, which come last
    )


def ledger_rows(
    step: int, rewarded: Sequence[RewardedGroup], signals: Sequence[Sequence[Learnt]], tokenizer: Any
) -> pa.Table:
    """One row a trajectory; ``signals`` by group and sibling."""
    found = _with_text(rewarded, pieces_of(tokenizer))
    each = [signal for group in signals for signal in group]
    found["step"] = pa.array(np.full(len(each), step), pa.int32())
    for name, _ in _LEARNT:
        found[name] = _floats([getattr(signal, name) for signal in each])
    return pa.Table.from_arrays([found[f.name] for f in SCHEMA], schema=SCHEMA)


def _floats(rows: Sequence[Sequence[float] | np.ndarray | None]) -> pa.ListArray:
    """Lists of numbers; None is null."""
    arrays = [np.asarray(() if row is None else row, np.float32) for row in rows]
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    values = np.concatenate([np.empty(0, np.float32), *arrays])
    mask = pa.array([row is None for row in rows])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=mask)


_REPEATED = ["problem_id", "prompt", *(f"{name}.list.element.pieces.list.element" for name in _BESIDE)]
"""Columns that Parquet keeps as a dictionary of their values; it would only slow down the others."""


def ledger_path(run: Path, step: int) -> Path:
    return run / "rollouts" / f"step-{step:06d}.parquet"


def write_ledger(run: Path, step: int, rows: pa.Table) -> None:
    """Write one step's rollouts atomically."""
    with atomic_file(ledger_path(run, step)) as temporary:
        pq.write_table(rows, temporary, compression="zstd", use_dictionary=_REPEATED, write_page_checksum=True)


def read_ledger(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A step's rollouts, or some columns of them, whose checksums have been verified."""
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {str(error).splitlines()[0]}") from None
