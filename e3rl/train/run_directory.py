"""The directory of a run: what is in it, who may write to it, and its line-a-step logs.

config.toml (resolved), metrics.jsonl, evaluations.jsonl, rollouts/*.parquet, checkpoints/, model/, summary.json, report.html
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from e3rl.config import Config, build_config, to_tables, to_toml
from e3rl.errors import UserError
from e3rl.files import clear_litter, disk_full_is_a_sentence, is_litter, write_text
from e3rl.parsing import parse_toml, read_text
from e3rl.sections import shown
from e3rl.train.metrics import finite_or_none

LOGS = ("metrics.jsonl", "evaluations.jsonl")

MAY_CHANGE = {
    *("run.name", "run.output_dir", "model.device"),
    *("rollout.max_rows", "rollout.cache_rows", "rollout.kv_budget", "rollout.vllm_sleep"),
    *(
        "train.micro_batch_tokens",
        "train.gradient_checkpointing",
        "train.activation_offload",
        "rewards.workers",
        "rewards.timeout",
    ),
    *("train.parallel", "train.context_parallel", "train.workers", "train.worker_gpus"),
    *("train.steps", "train.eval_steps", "train.save_steps"),
    *("train.save_total_limit", "train.show_steps", "train.report_to", "train.push_to_hub", "train.rank_timeout"),
    *("train.max_skipped_steps", "train.max_log_ratio", "train.max_kl"),
    *("rollout.workers", "rollout.worker_gpus", "rollout.worker_timeout", "rollout.address", "rollout.servers"),
}
"""Settings that a resumed run may have otherwise than the run it continues: where it is, how long, and what the machine can
take. None decides what is learnt but by rounding, and by a bound that a micro-batch sets itself (BAPO)."""


def _flat(config: Config) -> dict[str, Any]:
    return {f"{section}.{key}": v for section, table in to_tables(config).items() for key, v in table.items()}


def read_config(directory: Path) -> Config:
    """The resolved config that a run directory was made with."""
    path = directory / "config.toml"
    try:
        return build_config(parse_toml(read_text(path), path))
    except FileNotFoundError:
        raise UserError(f"{directory} is no run directory: it holds no config.toml") from None
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None


_CHECK = re.compile(rb', "crc32": "([0-9a-f]{8})"}$')
_CHECKED = re.compile(rb'crc32.{0,14}$|, "[^"]{5}": "[0-9a-f]{8}"}$')
"""A line that had a checksum: any one byte of it may be damaged."""


def log_line(record: Mapping[str, Any]) -> str:
    """A record as a line of a log. Its last key is the CRC-32 of what stands before, so that no changed digit is believed."""
    text = json.dumps({k: finite_or_none(v) for k, v in record.items()}, ensure_ascii=False)[:-1]
    return f'{text}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n'


def _record(line: bytes, checked: bool) -> dict[str, Any] | None:
    """What a line of a log holds, a JSON object that says its step; None where it is damaged."""
    found = _CHECK.search(line)
    if checked and not (found and zlib.crc32(line[: found.start()]) == int(found[1], 16)):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    record.pop("crc32", None)
    return record


def survey_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The intact records of a JSON-lines log, and the numbers of the lines that are damaged, from 1.

    Where any line carries its checksum all must; a log that was written without, or by hand, is read as it is.
    """
    if not path.exists():
        return [], []
    lines = path.read_bytes().split(b"\n")  # by line ends alone: a text may hold what Unicode calls a line break
    checked = any(map(_CHECKED.search, lines))
    found = {number: _record(line, checked) for number, line in enumerate(lines, 1) if line}
    return [r for r in found.values() if r is not None], [number for number, r in found.items() if r is None]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines log; damaged lines are left out, as is a last one cut short by a crash."""
    return survey_lines(path)[0]


def keep_copy(path: Path) -> Path:
    """Copy a damaged file to the first free name of NAME.damaged, NAME.damaged.1, …"""
    names = itertools.chain([f"{path.name}.damaged"], (f"{path.name}.damaged.{n}" for n in itertools.count(1)))
    copy = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    shutil.copyfile(path, copy)
    return copy


def run_path(config: Config) -> Path:
    """Where a config's run lives."""
    name = config.run.name
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise UserError(
            f"run.name = {shown(name)} must be the name of one directory; run.output_dir says where it lies"
        )
    return Path(config.run.output_dir) / name


def continue_or_put_aside(config: Config) -> bool:
    """Whether there is an unfinished run to continue; a finished one, or one of other settings, is renamed NAME.1, .2, …"""
    path = run_path(config)
    if not (path / "config.toml").exists():
        return False
    has_checkpoint = any((path / "checkpoints").glob("step-*"))
    if has_checkpoint and not (path / "summary.json").exists() and not changed_settings(read_config(path), config):
        return True
    RunDirectory(path).release()  # refused where another process is at work in it
    number = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.{n}").exists())
    path.rename(path.with_name(f"{path.name}.{number}"))
    return False


def changed_settings(before: Config, now: Config) -> list[str]:
    """Settings that differ and make it another run, as sentences."""
    then, today = _flat(before), _flat(now)
    if not before.data.eval and now.data.eval == (
        "auto",
    ):  # what the default is called; runs before that name wrote []
        then["data.eval"] = today["data.eval"]
    keys = [k for k in sorted(then | today) if then.get(k) != today.get(k) and k not in MAY_CHANGE]
    return [f"{k} ({then.get(k)!r} then, {today.get(k)!r} now)" for k in keys]


def ranges(numbers: Sequence[int]) -> str:
    """Ascending whole numbers in words: 1 to 3, 7."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


_claims: dict[Path, int] = {}
"""Directories that this process holds, each with the open descriptor of its lock."""


def _claim(path: Path) -> None:
    if path in _claims:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock ends with the process
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another process is training in {path}: wait until it ends, or choose another name: run.name=NAME"
        ) from None
    except OSError:  # a file system without locks
        pass
    _claims[path] = descriptor


class RunDirectory:
    """A run's directory, locked by this process: others are refused until it is released or the process ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claim = path.resolve()
        _claim(self._claim)
        clear_litter(path)

    def release(self) -> None:
        """Release the lock."""
        descriptor = _claims.pop(self._claim, None)
        if descriptor is not None:
            os.close(descriptor)

    @staticmethod
    def require(config: Config, *, resume: bool) -> Path:
        """The path of the run; UserError where it can't be started there, or resumed with these settings."""
        path = run_path(config)
        there = (path / "config.toml").exists()
        if resume and not there:
            raise UserError(f"{path} holds no run to resume; start it without --resume")
        if resume and (changed := changed_settings(read_config(path), config)):
            raise UserError(
                f"{path} was started with other settings, by its config.toml: {', '.join(changed)}. Resume with the same ones."
            )
        if there and not resume:
            raise UserError(
                f"{path} already holds a run. Continue it with --resume, or choose another name: run.name=NAME"
            )
        if not there and path.exists() and (not path.is_dir() or not all(is_litter(p) for p in path.iterdir())):
            raise UserError(f"{path} exists and is not an empty directory; choose another name: run.name=NAME")
        return path

    @classmethod
    def create(cls, config: Config) -> RunDirectory:
        """Claim a new directory; one that already holds a run is refused."""
        return cls._opened(config, resume=False)

    @classmethod
    def resume(cls, config: Config) -> RunDirectory:
        """Open an existing run, whose settings must be the same."""
        return cls._opened(config, resume=True)

    @classmethod
    def _opened(cls, config: Config, *, resume: bool) -> RunDirectory:
        path = cls.require(config, resume=resume)
        with disk_full_is_a_sentence(path):
            path.mkdir(parents=True, exist_ok=True)
        directory = cls(path)
        write_text(path / "config.toml", to_toml(config))
        return directory

    def append(self, log: str, record: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl`` or ``evaluations.jsonl`` and sync it to the disk."""
        path = self.path / log
        with disk_full_is_a_sentence(path), path.open("a", encoding="utf-8") as file:
            file.write(log_line(record))
            file.flush()
            os.fsync(file.fileno())

    def drop_after(self, step: int, note: Callable[[str], None], evaluations: int = 0) -> None:
        """Remove what was logged of steps after ``step``, which will be repeated.

        ``evaluations`` is how many were logged before ``step``; where fewer are left, ``note`` says so. A log with
        damaged lines is copied before they are left out, and ``note`` says so. A kill cuts the last line short at most, of a
        step that is done again: that is no damage.
        """
        for log in LOGS:
            path = self.path / log
            records, damaged = survey_lines(path)
            cut_short = [path.read_bytes().count(b"\n") + 1] if damaged else []
            if damaged and damaged != cut_short:
                lines = ", ".join(map(str, damaged))
                note(
                    f"{path}: can't read line {lines}; left out, and the file as it was is kept as {keep_copy(path).name}"
                )
            if log == "metrics.jsonl" and (missing := sorted(set(range(1, step + 1)) - {r["step"] for r in records})):
                note(f"{path}: nothing is logged of step {ranges(missing)}; curves and summary lack what is missing")
            kept = [r for r in records if r["step"] <= step]
            lost = evaluations - sum(r["step"] < step for r in kept)
            if log == "evaluations.jsonl" and lost > 0:
                note(
                    f"{path}: {lost} of {evaluations} evaluations before step {step} are missing; curves and summary lack them"
                )
            write_text(path, "".join(map(log_line, kept)))
        for ledger in (self.path / "rollouts").glob("step-*.parquet"):
            if int(ledger.stem.removeprefix("step-")) > step:
                ledger.unlink()
