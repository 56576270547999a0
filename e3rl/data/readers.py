"""Files and hub datasets as rows: pairs of *where* the row stands, for error messages, and its fields by name."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from e3rl.errors import UserError
from e3rl.model_files import hub_silent

Row = tuple[str, dict[str, Any]]

MAX_LINE_BYTES = 32 * 1024 * 1024


def _decode(raw: bytes, path: Path, first_line: int) -> str:
    """UTF-8 text without null bytes; ``first_line`` is the file's line number where ``raw`` begins."""
    try:
        text = raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw[: error.start].count(b"\n")
        hint = " (it looks like UTF-16)" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
        raise UserError(f"{path}:{line}: not valid UTF-8{hint}; convert the file to UTF-8") from None
    if "\0" in text:
        line = first_line + text[: text.index("\0")].count("\n")
        raise UserError(f"{path}:{line}: contains a null byte; the file is damaged, or it is not UTF-8 text")
    return text


def _parse_json(text: str, where: str, first_line: int | None = None) -> Any:
    """A JSON value; an error names ``where`` and, given ``first_line``, the line inside a text of many lines."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = where if first_line is None else f"{where}:{first_line + error.lineno - 1}"
        raise UserError(f"{place}: malformed JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{where}: JSON is nested too deeply to read") from None
    except ValueError as error:  # a whole number with more digits than Python converts
        raise UserError(f"{where}: {error}") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f'{where}: expected a JSON object like {{"prompt": …}}, got {_json_kind(value)}')
    return value


def _json_kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def read_jsonl(path: Path) -> Iterator[Row]:
    """One JSON object a line; blank lines are skipped."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(raw) > MAX_LINE_BYTES:
                limit = MAX_LINE_BYTES // 2**20
                raise UserError(f"{where}: the line is longer than {limit} MiB; JSONL has one object on each line")
            text = _decode(raw, path, number).strip()
            if text:
                yield where, _object(_parse_json(text, where), where)


def read_json(path: Path) -> Iterator[Row]:
    """One JSON array of objects; rows are counted from 1."""
    values = _parse_json(_decode(path.read_bytes(), path, 1), str(path), first_line=1)
    if not isinstance(values, list):
        kind = "an object" if isinstance(values, dict) else _json_kind(values)
        raise UserError(f"{path}: expected a JSON array of objects, got {kind}; name one-object-a-line files .jsonl")
    for number, value in enumerate(values, 1):
        where = f"{path}: row {number}"
        yield where, _object(value, where)


def read_csv(path: Path) -> Iterator[Row]:
    """Comma-separated values with a header line."""
    text = _decode(path.read_bytes(), path, 1)
    previous = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        yield from list(_csv_rows(text, path))  # read whole: the field limit is global and must not outlive this call
    finally:
        csv.field_size_limit(previous)


def _csv_rows(text: str, path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    try:
        for fields in reader:
            where = f"{path}:{reader.line_num}"
            if not fields:
                continue
            if header is None:
                header = fields
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise UserError(f"{where}: the header names a column twice: {', '.join(twice)}")
            elif len(fields) != len(header):
                raise UserError(f"{where}: {len(fields)} fields, but the header has {len(header)} columns")
            else:
                yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: malformed CSV: {error}") from None


def read_parquet(path: Path) -> Iterator[Row]:
    """A Parquet file; rows are counted from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        after = f" after row {number}" if number else ""
        raise UserError(f"{path}: not a readable Parquet file (damaged or cut off?){after}: {error}") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def read_file(path: Path) -> Iterator[Row]:
    """The rows of a data file, by its extension."""
    if not path.is_file():
        raise UserError(_no_such_file(path))
    try:
        yield from READERS[path.suffix.lower()](path)
    except PermissionError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None


def _no_such_file(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a directory, not a data file"
    if not path.parent.is_dir():
        return f"no such file: {path} (there is no directory {path.parent})"
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in READERS)
    nearest = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{path.parent / nearest[0]}'?" if nearest else ""
    return f"no such file: {path}.{hint}"


_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def looks_like_hub_id(source: str) -> bool:
    """Whether ``source`` is spelled like a hub dataset: NAME, OWNER/NAME or OWNER/NAME:SUBSET."""
    return _HUB_ID.fullmatch(source) is not None


def read_dataset(source: str, split: str) -> Iterator[Row]:
    """A split of a hub dataset, of a directory written by ``save_to_disk``, or of a directory of data files."""
    import datasets

    try:
        dataset = _load_dataset(datasets, source, split)
    except UserError:
        raise
    except Exception as error:  # network, cache, parsing: the library documents no list of exceptions
        silent = "" if Path(source).is_dir() else hub_silent()
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        reason = f"it is not on this machine, and {silent}." if silent else reason
        raise UserError(
            f"dataset '{source}' (split '{split}') can't be loaded: {reason} "
            f"If you meant a file: there is none of that name. Without a network, use a local file or directory."
        ) from None
    for number, row in enumerate(dataset, 1):
        yield f"{source}[{split}]: row {number}", dict(row)


def _load_dataset(datasets: Any, source: str, split: str) -> Any:
    directory = Path(source)
    saved = [directory / "dataset_dict.json", directory / "state.json"]
    if directory.is_dir() and any(p.is_file() for p in saved):
        loaded = datasets.load_from_disk(source)
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if split not in loaded:
            raise UserError(f"{source} has no split '{split}'; it has: {', '.join(loaded)}")
        return loaded[split]
    if directory.is_dir():
        return datasets.load_dataset(source, split=split)
    hub_silent()  # then the cache alone is used
    name, _, subset = source.partition(":")
    return datasets.load_dataset(name, subset or None, split=split)
