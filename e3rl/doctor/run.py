"""Checks of a run directory: what is complete, what is damaged, and how to continue."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from e3rl.doctor.finding import CheckResult
from e3rl.errors import UserError
from e3rl.files import MANIFEST, damage, is_litter, write_text
from e3rl.train.checkpoint import list_checkpoints
from e3rl.train.journal import survey
from e3rl.train.ledger import READABLE, read_ledger
from e3rl.train.nonfinite import skipped_steps
from e3rl.train.run_directory import LOGS, RunDirectory, keep_copy, ranges, read_config, read_lines, survey_lines


def _put_aside(path: Path) -> Callable[[], None]:
    def repair() -> None:
        path.rename(path.with_name(f"damaged-{path.name}"))

    return repair


def _without(path: Path, damaged: Sequence[int]) -> Callable[[], None]:
    """Removes damaged lines from a log and keeps a copy of the original."""

    def repair() -> None:
        keep_copy(path)
        lines = path.read_bytes().split(b"\n")
        whole = b"".join(line + b"\n" for number, line in enumerate(lines, 1) if line and number not in damaged)
        write_text(path, whole.decode("utf-8"))

    return repair


def check_config(run: Path) -> Iterator[CheckResult]:
    """The resolved recipe reads back."""
    try:
        config = read_config(run)
    except UserError as error:
        yield CheckResult("problem", "config.toml", f"{error}. Restore it from the recipe that started the run")
        return
    yield CheckResult(
        "ok", "config.toml", f"{config.objective.name} on {config.data.trained_on}, model {config.model.path}"
    )


def check_logs(run: Path) -> Iterator[CheckResult]:
    """The logs with one line for each step: every line can be read, and the steps are consecutive."""
    for name in LOGS:
        path = run / name
        if not path.exists():
            if name == "metrics.jsonl" and any(list_checkpoints(run)[:-1]):
                yield CheckResult("problem", name, "is missing, though steps were trained")
            continue
        kept, damaged = survey_lines(path)
        if damaged:
            text = f"line {', '.join(map(str, damaged))} can't be read: cut short by a crash, or damaged"
            yield CheckResult("problem", name, text, _without(path, damaged))
        else:
            yield CheckResult("ok", name, f"{len(kept)} lines")
    steps = [r.get("step") for r in read_lines(run / "metrics.jsonl")]
    if steps != list(range(1, len(steps) + 1)):
        yield CheckResult("problem", "metrics.jsonl", "its steps do not follow each other from 1")


def _ledger_problem(path: Path) -> str | None:
    try:
        found = (pq.read_schema(path).metadata or {}).get(b"format", b"none").decode("utf-8", "replace")
        if found not in READABLE:
            return f"has format {found}; this version reads {' and '.join(READABLE)}"
        read_ledger(path)
    except UserError as error:
        return str(error).removeprefix(f"{path} ")
    except (pa.ArrowException, OSError) as error:
        return f"can't be read: {str(error).splitlines()[0]}"
    return None


def check_rollouts(run: Path) -> Iterator[CheckResult]:
    """Every step of the log has its rollouts, and their files can be read."""
    paths = sorted((run / "rollouts").glob("step-*.parquet"))
    for path in paths:
        problem = _ledger_problem(path)
        if problem:
            yield CheckResult("problem", f"rollouts/{path.name}", problem, _put_aside(path))
    logged = {r.get("step") for r in read_lines(run / "metrics.jsonl")}
    missing = sorted(s for s in logged - {int(p.stem.removeprefix("step-")) for p in paths} if isinstance(s, int))
    if missing:
        yield CheckResult("problem", "rollouts", f"the rollouts of step {ranges(missing)} are missing")
    yield CheckResult("ok", "rollouts", f"{len(paths)} files")


def check_checkpoints(run: Path) -> Iterator[CheckResult]:
    """Checkpoints by their checksums, and the finished model."""
    checkpoints = list_checkpoints(run)
    for directory in checkpoints:
        problem = damage(directory)
        name = f"checkpoints/{directory.name}"
        if problem:
            yield CheckResult("problem", name, f"{problem}; the one before will be used", _put_aside(directory))
        else:
            yield CheckResult("ok", name, "intact")
    if (run / "model" / MANIFEST).exists() and (problem := damage(run / "model")):
        yield CheckResult("problem", "model", f"{problem}; write it again with --resume after deleting summary.json")


def check_journal(run: Path) -> Iterator[CheckResult]:
    """Journals of rollouts that no checkpoint holds."""
    for path in sorted((run / "journal").glob("step-*.journal")):
        kept, torn = survey(path.read_bytes())
        text = kept + (f", and {torn} bytes that a kill cut short" if torn else "")
        yield CheckResult("note" if torn else "ok", f"journal/{path.name}", text)


def check_state(run: Path) -> Iterator[CheckResult]:
    """Skipped steps, half-written files, and how to continue."""
    if kept := skipped_steps(run):
        yield CheckResult("note", "skipped", f"steps {', '.join(map(str, kept))} were skipped; see 'e3rl replay {run}'")
    litter = [p for p in run.rglob(".*.tmp") if is_litter(p)]
    if litter:
        text = f"{len(litter)} half-written files of a killed process; the next start removes them"
        yield CheckResult("note", "litter", text)
    done = read_lines(run / "metrics.jsonl")
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        yield CheckResult("ok", "state", f"finished after {summary['steps']} steps")
    except FileNotFoundError:
        intact = next((d.name for d in list_checkpoints(run) if not damage(d)), None)
        start = f"from {intact}" if intact else "from the beginning"
        yield CheckResult("note", "state", f"unfinished, {len(done)} steps logged; --resume continues {start}")
    except (ValueError, KeyError, TypeError) as error:
        yield CheckResult("problem", "summary.json", f"is damaged: {error}", _put_aside(run / "summary.json"))


def check_run(run: Path) -> Iterator[CheckResult]:
    """Everything about a run directory."""
    for check in (check_config, check_logs, check_rollouts, check_checkpoints, check_journal, check_state):
        yield from check(run)


def repair_run(run: Path, findings: list[CheckResult]) -> int:
    """Repair what can be repaired and return the number. Refused while a process trains in the directory."""
    held = RunDirectory(run)  # clears half-written files
    try:
        repairs = [f.repair for f in findings if f.repair is not None]
        for repair in repairs:
            repair()
        return len(repairs)
    finally:
        held.release()
