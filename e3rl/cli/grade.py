"""`e3rl grade`: only the answer checker, on a file of references and responses."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from e3rl.errors import UserError

_BATCH = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="JSON lines with 'gold' and 'pred'; either may be running text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write here; default: standard output")
    parser.add_argument(
        "--unboxed",
        choices=("last", "stated", "none"),
        default="last",
        help="what counts without a box: what is stated as the answer, or else the last number too (default), or nothing",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that check answers (default 1)")
    parser.add_argument(
        "--timeout", type=float, default=5.0, metavar="S", help="seconds that one check may take (default 5)"
    )


def run(options: argparse.Namespace) -> int:
    if options.workers < 1 or not options.timeout > 0:
        raise UserError("--workers must be at least 1, --timeout above 0")
    if not options.file.is_file():
        raise UserError(f"no such file: {options.file}")
    if options.output and options.output.resolve() == options.file.resolve():
        raise UserError("--output is the file that is read: name another one")
    if options.output is None:
        counts = _grade(options, sys.stdout)
    else:
        from e3rl.files import atomic_file

        with atomic_file(options.output) as temporary, temporary.open("w", encoding="utf-8") as out:
            counts = _grade(options, out)
    total = sum(counts.values())
    print(f"{total} lines: {counts[True]} right, {counts[False]} wrong, {counts[None]} can't be said", file=sys.stderr)
    return 0


def _grade(options: argparse.Namespace, out: IO[str]) -> Counter[bool | None]:
    """Write every line of the file with its grade; unreadable lines get null and their location."""
    from e3rl.rewards.grading import Grade, grade_all
    from e3rl.rewards.pool import ProcessPool

    counts: Counter[bool | None] = Counter()
    pool = ProcessPool(options.workers, options.timeout)
    try:
        for batch in _batches(options.file):
            good = [row for row, fault in batch if fault is None]
            pairs = [(_text(row["gold"]), _text(row["pred"])) for row in good]
            grades = iter(grade_all(pairs, pool, unboxed=options.unboxed))
            for row, fault in batch:
                grade = Grade(None, fault) if fault is not None else next(grades)
                counts[grade.correct] += 1
                out.write(
                    _line(
                        {**row, "correct": grade.correct, "reason": grade.reason},
                        getattr(out, "encoding", None) or "utf-8",
                    )
                )
            out.flush()
    finally:
        pool.close()
    return counts


def _line(row: dict[str, Any], encoding: str) -> str:
    """A row as JSON; escaped if it has characters that the output can't encode, such as lone surrogates."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(row) + "\n"
    return line


def _batches(path: Path) -> Iterator[list[tuple[dict[str, Any], str | None]]]:
    """Rows, each with its error or None, in batches; blank lines are skipped."""
    batch: list[tuple[dict[str, Any], str | None]] = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                batch.append(_row(raw, f"{path}:{number}"))
            if len(batch) == _BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def _row(raw: bytes, where: str) -> tuple[dict[str, Any], str | None]:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return {}, f"{where}: not valid UTF-8"
    except json.JSONDecodeError as error:
        return {}, f"{where}: malformed JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return {}, f"{where}: {error}"
    if not isinstance(row, dict):
        return {}, f"{where}: expected an object with 'gold' and 'pred', got {type(row).__name__}"
    missing = [name for name in ("gold", "pred") if name not in row]
    if missing:
        return row, f"{where}: no field '{missing[0]}'; fields found: {', '.join(map(str, row)) or 'none'}"
    for name in ("gold", "pred"):
        if isinstance(row[name], bool) or not isinstance(row[name], str | int | float):
            return row, f"{where}: '{name}' must be a string or a number, got {type(row[name]).__name__}"
    return row, None


def _text(value: str | int | float) -> str:
    """A field as text; lone surrogates, which UTF-8 can't encode, become question marks."""
    return str(value).encode("utf-8", "replace").decode("utf-8")
