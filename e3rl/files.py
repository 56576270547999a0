"""Atomic writes: a file is written under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from e3rl.errors import UserError

MANIFEST = "MANIFEST.json"


def _error_number(error: Exception) -> int | None:
    """The errno of an exception. Libraries in Rust, such as safetensors, have it only in their message."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


@contextlib.contextmanager
def disk_full_is_a_sentence(path: Path) -> Iterator[None]:
    """Turn 'no space left' and 'not permitted' while writing ``path`` into a UserError."""
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"no space left on the disk while writing {path}; free some and continue the run"
            ) from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"{path} can't be written: {os.strerror(number)}") from error
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path to write; it replaces ``path`` if the block succeeds and is deleted if not."""
    with disk_full_is_a_sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


_TEMPORARY = re.compile(r"\..*\.(\d+)\.tmp")


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()  # a file with this process's id is from an earlier process


def is_litter(path: Path) -> bool:
    """Whether it is a temporary that a killed process left behind."""
    temporary = _TEMPORARY.fullmatch(path.name)
    return temporary is not None and not _lives(int(temporary[1]))


def clear_litter(directory: Path) -> None:
    """Remove temporary files of killed processes, here and below. Call it before this process writes there."""
    for path in [p for p in directory.rglob(".*.tmp") if is_litter(p)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary directory to fill; it gets a manifest of checksums and becomes ``path`` if the block succeeds."""
    with disk_full_is_a_sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            files = sorted(p for p in temporary.rglob("*") if p.is_file())
            write_json(temporary / MANIFEST, {str(p.relative_to(temporary)): _digest(p) for p in files})
            for file in files:
                _sync(file)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def damage(directory: Path) -> str | None:
    """What is wrong with a directory written by `atomic_directory`, in words; None if it is intact."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, OSError) as error:
        return f"{MANIFEST} can't be read: {error}"
    for name, digest in manifest.items():
        file = directory / name
        if not file.is_file():
            return f"{name} is missing"
        if _digest(file) != digest:
            return f"{name} does not match its checksum"
    return None
