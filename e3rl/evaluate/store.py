"""A directory of samples: their identity, one stream for each shard, and the units that are missing.

The unit is a group: one problem's samples of one mode and round. A group that is not whole in the stream is drawn again
with the same random numbers, so an interrupted evaluation continues exactly where it stopped.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from e3rl import parsing
from e3rl.config import ErasureConfig
from e3rl.errors import UserError
from e3rl.evaluate.samples import Sample
from e3rl.files import atomic_file, disk_full_is_a_sentence, write_json, write_text

IDENTITY = "identity.json"
FIGURES = "evaluation.json"
TABLE = "samples.parquet"
_PATTERN = "samples*.jsonl"


@dataclass(frozen=True, order=True)
class Unit:
    """A group to be sampled: ``size`` samples of a problem, the first of them number ``first``."""

    mode: str
    round: int
    problem: str
    first: int
    size: int


@dataclass(frozen=True)
class Shard:
    """Every ``of``-th problem, beginning with the ``index``-th; counted from 1."""

    index: int = 1
    of: int = 1

    @staticmethod
    def parse(text: str) -> Shard:
        """``2/4``."""
        index, _, of = text.partition("/")
        if not (index.isdecimal() and of.isdecimal() and 1 <= int(index) <= int(of)):
            raise UserError(f"--shard {text}: write I/N, the I-th of N parts, for example 1/4")
        return Shard(int(index), int(of))

    @property
    def file(self) -> str:
        return "samples.jsonl" if self.of == 1 else f"samples-{self.index}of{self.of}.jsonl"

    def take(self, units: Sequence[Unit], problems: Sequence[str]) -> list[Unit]:
        """This shard's units."""
        mine = set(problems[self.index - 1 :: self.of])
        return [unit for unit in units if unit.problem in mine]


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """The differences of two identities, field by field, for an error message."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            yield from differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path}: {before!r} there, {now!r} now"


def _as_now(section: str, before: Any, now: Any) -> Any:
    """A section as an older version wrote it: settings of erasing that it did not have were what their defaults are."""
    if section != "erasure":
        return before
    defaults = {name: value for name, value in asdict(ErasureConfig()).items() if name in now}
    return {**defaults, **before}


class SampleStore:
    """The directory of one evaluation."""

    def __init__(self, directory: Path) -> None:
        self.path = directory

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Write the identity of the samples; UserError if the directory has samples of another one. New sections may be added."""
        before = self.identity()
        if before is None:
            if any(self.path.glob(_PATTERN)):
                raise UserError(f"{self.path} holds samples and no {IDENTITY}: choose another --output")
            write_json(self.path / IDENTITY, identity)
            return
        shared = before.keys() & identity.keys()
        found = list(
            differences({k: _as_now(k, before[k], identity[k]) for k in shared}, {k: identity[k] for k in shared})
        )
        if found:
            raise UserError(
                f"{self.path} holds samples of another evaluation ({'; '.join(found[:4])}): they are not mixed. "
                "Choose another --output, or remove that directory"
            )
        if identity.keys() - before.keys():
            write_json(self.path / IDENTITY, {**before, **identity})

    def identity(self) -> dict[str, Any] | None:
        """The identity of the samples; None if the directory is new."""
        return read_json(self.path / IDENTITY)

    def units(self) -> list[list[Sample]]:
        """The complete groups, each once."""
        groups: dict[tuple[str, int, str], dict[int, Sample]] = {}
        sizes: dict[tuple[str, int, str], int] = {}
        for path in sorted(self.path.glob(_PATTERN)):
            for row in _rows(path):
                sample = Sample.of(row)
                key = (sample.mode, sample.round, sample.problem)
                groups.setdefault(key, {})[sample.sample] = sample
                sizes[key] = row["group_size"]
        return [[*found.values()] for key, found in groups.items() if len(found) == sizes[key]]

    def samples(self) -> list[Sample]:
        """All samples of complete groups."""
        return [sample for unit in self.units() for sample in unit]

    def missing(self, wanted: Iterable[Unit]) -> list[Unit]:
        """The units that are still missing, in the order given."""
        have = {(unit[0].mode, unit[0].round, unit[0].problem) for unit in self.units()}
        return [unit for unit in wanted if (unit.mode, unit.round, unit.problem) not in have]

    def writer(self, shard: Shard) -> Writer:
        """The stream of one shard, for a ``with`` block; one process at a time."""
        return Writer(self.path / shard.file)

    def write_table(self, samples: Sequence[Sample]) -> None:
        """All samples as one Parquet file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with atomic_file(self.path / TABLE) as temporary:
            pq.write_table(pa.Table.from_pylist([asdict(s) for s in samples]), temporary)


class Writer:
    """Appends complete groups to a stream, each flushed to disk before the next."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> Writer:
        with disk_full_is_a_sentence(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._path.with_name(f".{self._path.stem}.lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise UserError(f"another evaluation is writing {self._path}: wait for it, or end it") from None
            _drop_half_groups(self._path)
            self._file = self._path.open("a", encoding="utf-8")
        return self

    def write(self, samples: Sequence[Sample]) -> None:
        """One whole group."""
        assert self._file is not None
        with disk_full_is_a_sentence(self._path):
            lines = [json.dumps({**asdict(s), "group_size": len(samples)}, ensure_ascii=False) for s in samples]
            self._file.write("\n".join(lines) + "\n")
            self._file.flush()

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.close()


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a stream. A truncated last line is left out; any other damage is an error."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            Sample.of(row), row["group_size"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):  # no newline after it: the process ended while writing
                return
            raise UserError(
                f"{path}:{number}: not a sample; the file is damaged: remove that line, it is drawn again"
            ) from None
        yield row


def _drop_half_groups(path: Path) -> None:
    """Rewrite a stream without the partial group that an interrupted process left."""
    if not path.is_file():
        return
    rows = list(_rows(path))
    counts: dict[tuple[Any, ...], int] = {}
    for row in rows:
        key = (row["mode"], row["round"], row["problem"])
        counts[key] = counts.get(key, 0) + 1
    whole = [row for row in rows if counts[row["mode"], row["round"], row["problem"]] == row["group_size"]]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in whole)
    if text != path.read_text(encoding="utf-8", errors="replace"):
        write_text(path, text)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if there is no such file, UserError if it is damaged."""
    try:
        value = parsing.read_json(path, finite=False)
    except FileNotFoundError:
        return None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return value
