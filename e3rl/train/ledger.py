"""The rollout ledger: every trajectory with all that was erased on the way, one Parquet file a step.

It is `e3rl.rollout.columns.SCHEMA` with the text of everything, and what the trajectories were trained with. `SCHEMA` here is the
file format's definition; its field metadata says what each column holds, and docs/run-directory.md is generated from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def ledger_rows(step: int, rewarded: Sequence[RewardedGroup], lessons: Iterable[Lesson], tokenizer: Any) -> pa.Table:
    """One row a trajectory, with what ``lessons`` say of those that were trained on."""
    found = _with_text(rewarded, pieces_of(tokenizer)) | _learnt(rewarded, lessons)
    found["step"] = pa.array(np.full(len(found["sibling"]), step), pa.int32())
    return pa.Table.from_arrays([found[f.name] for f in SCHEMA], schema=SCHEMA)


def _learnt(rewarded: Sequence[RewardedGroup], lessons: Iterable[Lesson]) -> dict[str, pa.Array]:
    """The columns of `_LEARNT`. Of a trajectory's lessons its own comes first, then those of its erased candidates."""
    by_place: dict[tuple[int, int], list[Lesson]] = {}
    for lesson in lessons:
        by_place.setdefault((lesson.sequence.group, lesson.sequence.sibling), []).append(lesson)
    places = [(group, t.sibling) for group, item in enumerate(rewarded) for t in item.group.trajectories]
    each = [by_place.get(place, []) for place in places]
    shares = [x[0].scores.shares_T if x else None for x in each]
    return {
        "advantages": _floats([x[0].advantages_T.numpy() if x else () for x in each]),
        "shares": _floats([None if shares_T is None else shares_T.numpy() for shares_T in shares]),
        # an erased candidate's advantage is the same on all its tokens, which come last
        "erased_advantages": _floats([[float(lesson.advantages_T[-1]) for lesson in x[1:]] for x in each]),
    }


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
