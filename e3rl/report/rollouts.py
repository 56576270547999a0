"""Rollouts as the page reads them: the ledger's rows grouped by problem, and a small index to filter and sort by."""

from __future__ import annotations

import base64
import copy
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from e3rl.errors import UserError
from e3rl.report.embed import to_json
from e3rl.train.metrics import mean
from e3rl.types import TERMS

_INDEX_ROW = 110  # approximate bytes of a rollout in the index
_SNIPPET = 40  # characters of a response's end that a list shows

_ROWS_AT_A_TIME = 64
_TERMS = ("uncertainty", *TERMS)
_FACTORS = ("threshold", "baseline", "penalty", "modulation")


@dataclass(frozen=True)
class StepRollouts:
    """One step's rollouts: one index row for each, and all rollouts as packed JSON (gzip in base64)."""

    step: int
    index: tuple[dict[str, Any], ...]
    packed: str
    total: int  # rollouts in the ledger, including those that did not fit
    answered: bool  # a problem has a reference answer

    @property
    def json(self) -> str:
        """The rollouts as JSON that a page may hold."""
        return gzip.decompress(base64.b64decode(self.packed)).decode()


@dataclass(frozen=True)
class Selection:
    """The rollouts that fit into a page, by step, and their total number."""

    steps: tuple[StepRollouts, ...]
    total: int
    total_steps: int

    def index(self) -> dict[str, list[Any]]:
        """The index of all steps, one list for each column."""
        rows = [row for step in self.steps for row in step.index]
        return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def select(run: Path, budget: int) -> Selection:
    """The newest steps whose rollouts together fit into ``budget`` bytes."""
    paths = sorted((run / "rollouts").glob("step-*.parquet"), reverse=True)
    chosen: list[StepRollouts] = []
    room = budget
    used = set()
    for path in paths:
        status = path.stat()
        key = (path, status.st_mtime_ns, status.st_size, budget)
        step = _read_before.get(key) or read_step(path, budget)
        room -= len(step.packed) + _INDEX_ROW * len(step.index)
        if chosen and room < 0:
            break
        chosen.append(step)
        used.add(key)
        _read_before[key] = step
    for key in [k for k in _read_before if k[0].parent == run / "rollouts" and k not in used]:
        _read_before.pop(key, None)
    total = sum(_rows_in(path) for path in paths)
    return Selection(tuple(reversed(chosen)), total, len(paths))


def _rows_in(path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no whole rollout ledger ({error}); move it elsewhere to see the others") from None


_read_before: dict[tuple[Path, int, int, int], StepRollouts] = {}
"""Cache of the last selection of each run, by file and the file's state: the page is rewritten every few steps, and reading
a step again would cost as much as the first time."""


def read_step(path: Path, budget: int) -> StepRollouts:
    """The groups of one ledger file, the first of them that fit into ``budget`` bytes (and one at least)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    index: list[dict[str, Any]] = []
    answered = False
    step = int(path.stem.removeprefix("step-"))
    packer = _Packer(f'{{"step":{step},"groups":[')
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            total = file.metadata.num_rows
            for rows in _groups(file.iter_batches(batch_size=_ROWS_AT_A_TIME)):
                longer = packer.with_text(("," if index else "") + to_json(encode_group(rows)))
                if index and longer.size > budget:
                    break
                packer = longer
                index += index_rows(step, rows)
                answered = answered or rows[0]["answer"] is not None
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:  # a damaged file may raise any of these
        raise UserError(f"{path} is no whole rollout ledger ({error}); move it elsewhere to see the others") from None
    return StepRollouts(step, tuple(index), packer.closed_by("]}"), total, answered)


class _Packer:
    """Packs text piece by piece; a piece can still be undone."""

    def __init__(self, text: str) -> None:
        self._stream = zlib.compressobj(wbits=31)
        self._parts = [self._stream.compress(text.encode())]

    @property
    def size(self) -> int:
        """Bytes in base64 so far."""
        return sum(map(len, self._parts)) * 4 // 3

    def with_text(self, text: str) -> _Packer:
        longer = copy.copy(self)
        longer._stream = self._stream.copy()
        longer._parts = [*self._parts, longer._stream.compress(text.encode()), longer._stream.flush(zlib.Z_SYNC_FLUSH)]
        return longer

    def closed_by(self, text: str) -> str:
        end = self._stream.compress(text.encode()) + self._stream.flush()
        return base64.b64encode(b"".join([*self._parts, end])).decode()


def _groups(batches: Iterable[Any]) -> Iterator[list[dict[str, Any]]]:
    rows = (row for batch in batches for row in batch.to_pylist())
    for _, siblings in groupby(rows, key=lambda row: row["problem_id"]):
        yield list(siblings)


def encode_group(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The siblings of one problem."""
    first = rows[0]
    return {
        "problem": first["problem_id"],
        "prompt": first["prompt"],
        "answer": first["answer"],
        "rollouts": [encode_rollout(row) for row in rows],
    }


def encode_rollout(row: Mapping[str, Any]) -> dict[str, Any]:
    """One trajectory. Values for each token are split by segment."""
    segments = []
    for segment in row["segments"]:
        span = slice(segment["start"], segment["start"] + len(segment["ids"]))
        signals = {"advantage": _constant(_rounded((row["advantages"] or [])[span]))}
        if row["shares"] is not None:
            signals["share"] = [float(f"{share:.3g}") or 0 for share in row["shares"][span]]
        segments.append({**encode_candidate(segment), **signals})
    erasures = [{**encode_candidate(e), "start": e["start"]} for e in row["erasures"]]
    for erasure, advantage in zip(erasures, row["erased_advantages"], strict=False):
        erasure["advantage"] = round(advantage, 3)
    return {
        "sibling": row["sibling"],
        "reward": row["reward"],
        "parts": dict(row["reward_parts"] or ()),
        "error": row["reward_error"],
        "finish": row["finish"],
        "segments": segments,
        "erasures": erasures,
    }


def encode_candidate(row: Mapping[str, Any]) -> dict[str, Any]:
    """A segment or an erased candidate; ``u`` and ``theta`` are None if it was not judged. With an ``observation`` it is an
    environment's answer, or a whole turn that was erased after one."""
    judged = row["verdict"] is not None
    seen = row.get("observation")  # ledgers of older versions, without environments, have none
    return {
        **({} if seen is None else {"observation": json.loads(seen)}),
        "index": row["index"],
        "pieces": row["pieces"],
        "entropy": _rounded(row["entropies"]),
        "logprob": _rounded(row["logprobs"]),
        "perturbation": _rounded(row["perturbations"]),
        "rank": row["ranks"],
        "u": _rounded([row[name] for name in _TERMS]) if judged else None,
        "theta": _rounded([row[name] for name in _FACTORS]) if judged else None,
        "attempt": row["attempt"],
        "verdict": row["verdict"],
    }


def index_rows(step: int, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The index row: the values that a list of rollouts shows, filters and sorts by."""
    average = mean(row["reward"] for row in rows if row["reward"] is not None)
    return [
        {
            "step": step,
            "problem": row["problem_id"],
            "sibling": row["sibling"],
            "reward": row["reward"],
            "tokens": sum(len(s["ids"]) for s in row["segments"]),
            "erased": len(row["erasures"]),
            "forced": sum(s["verdict"] == "forced" for s in row["segments"]),
            "flips": _sign_flips(row, average),
            "finished": row["finish"] == "stop",
            "snippet": snippet(row["response"]),
        }
        for row in rows
    ]


def snippet(text: str) -> str:
    """The end of a response in one line; the answer is usually there."""
    line = " ".join(text.split())
    return line if len(line) <= _SNIPPET else "…" + line[1 - _SNIPPET :]


def _sign_flips(row: Mapping[str, Any], average: float) -> int:
    """Tokens whose advantage has the sign opposite to that of the whole response's."""
    if row["reward"] is None:
        return 0
    return sum(a * (row["reward"] - average) < 0 for a in row["advantages"] or ())


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    """Three decimals; the frequent zeros in one character."""
    return [None if v is None or not math.isfinite(v) else round(v, 3) or 0 for v in values]


def _constant(values: list[float | None]) -> list[float | None] | float | None:
    """A single value if all are the same."""
    return values[0] if values and all(v == values[0] for v in values) else values
