"""Record batches of groups as bytes, and back: whatever is not this version's schema, whole and consistent, is a ValueError.

Bytes come from other processes, which may be hostile, and from files, which may be damaged.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from e3rl.rollout.columns import NUMBERS, SCHEMA
from e3rl.types import COLUMNS, Verdict


def to_ipc(batches: Iterable[pa.RecordBatch]) -> bytes:
    """The batches as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue())


def from_ipc(content: bytes) -> list[pa.RecordBatch]:
    """The batches of an Arrow IPC stream, checked; ValueError where they are no groups."""
    try:
        with pa.ipc.open_stream(content) as reader:
            if not reader.schema.equals(SCHEMA):
                raise ValueError("its columns are not those of this version's groups")
            batches = list(reader)
    except (pa.ArrowException, OSError, EOFError, MemoryError) as error:
        raise ValueError(f"no groups in Arrow's format ({str(error).splitlines()[0]})") from None
    for batch in batches:
        check(batch)
    return batches


def read_batch(content: bytes) -> pa.RecordBatch:
    """A batch that was serialised without its schema, checked; ValueError where it is none."""
    try:
        batch = pa.ipc.read_record_batch(pa.py_buffer(content), SCHEMA)
    except (pa.ArrowException, OSError, EOFError, MemoryError) as error:
        raise ValueError(f"no record batch ({str(error).splitlines()[0]})") from None
    check(batch)
    return batch


def problem_of(batch: pa.RecordBatch) -> str:
    """The id of the problem that all rows are about; ValueError where there is not one."""
    found = set(batch["problem_id"].to_pylist())
    if len(found) != 1:
        raise ValueError(f"a group of {len(found)} problems")
    return str(found.pop())


def check(batch: pa.RecordBatch) -> None:
    """ValueError where a batch that has this schema is inconsistent: it may come from a damaged file or a hostile process."""
    try:
        batch.validate(full=True)
    except pa.ArrowException as error:
        raise ValueError(f"damaged columns ({str(error).splitlines()[0]})") from None
    for name in ("problem_id", "sibling", "prompt_ids", "segments", "erasures"):
        _require_no_nulls(batch[name], name)
    if not set(batch["finish"].to_pylist()) <= {"stop", "length", None}:
        raise ValueError("responses that end in another way than 'stop' or 'length'")
    _require_no_nulls(batch["prompt_ids"].values, "prompt_ids")
    for name in ("segments", "erasures"):
        _check_candidates(batch[name].values, name)


def _require_no_nulls(array: pa.Array, name: str) -> None:
    if array.null_count:
        raise ValueError(f"column {name} has nulls")


def _check_candidates(struct: pa.StructArray, name: str) -> None:
    _require_no_nulls(struct, name)
    places = struct.field("ids").offsets.to_numpy()
    for column in ("index", "start", "ended", *COLUMNS):
        _require_no_nulls(struct.field(column), f"{name}.{column}")
    for column in COLUMNS:
        _require_no_nulls(struct.field(column).values, f"{name}.{column}")
        if not np.array_equal(struct.field(column).offsets.to_numpy(), places):
            raise ValueError(f"candidates with other numbers of {column} than tokens")
    unjudged = struct.field("verdict").is_null()
    if not set(struct.field("verdict").drop_null().to_pylist()) <= set(Verdict):
        raise ValueError("verdicts that are none")
    attempts = pc.or_(struct.field("attempt").is_valid(), unjudged)
    if not pc.all(attempts, min_count=0).as_py() or any(
        not struct.field(c).is_null().equals(unjudged) for c in NUMBERS
    ):
        raise ValueError("judgements that are incomplete")
