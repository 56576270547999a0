"""Runs that are killed at random, again and again, and must end as the one that nobody touched, to the last bit.

    python -m tests.chaos.kills --kills 50

A life is a forked process that runs ``e3rl train … --resume``. It ends by SIGKILL: at a random time, or at a random one
of the calls by which things reach the disk, where the file is left half written.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from e3rl.cli.main import main as e3rl
from e3rl.errors import UserError
from e3rl.train import checkpoint, journal
from e3rl.train.ledger import read_ledger
from e3rl.train.run_directory import read_lines
from tests.chaos.killing import Ended, Tally, kill_runs

RECIPE = """
[data]
train = "lab:chain:1"
train_limit = 10
[rollout]
temperature = 1.8
num_generations = 4
segment_length = 6
max_segments = 4
max_rows = 16
[erasure]
base_weight = 0.0
gradient_weight = 0.0
extremum_weight = 0.0
perturbation_weight = 1.0
kappa0 = -0.3
max_erasures = 2
on_exhausted = "least_uncertain"
[objective]
name = "e3rl"
erased = "contrast"
[filter]
name = "nonzero_spread"
max_refills = 1
[rewards]
functions = ["lab"]
[train]
steps = 7
prompts_per_step = 3
learning_rate = 1e-4
save_steps = 3
save_total_limit = 2
eval_steps = 4
[eval]
limit = 2
num_samples = 2
"""


def write_half(path: Path) -> None:
    """Leave the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


@dataclass
class Crash:
    """Ends this process at the nth call of a kind; with nth 0 it only counts."""

    kind: str = ""
    nth: int = 0
    calls: Counter[str] = field(default_factory=Counter)

    def reached(self, kind: str) -> bool:
        """Whether this call is the one."""
        self.calls[kind] += 1
        return kind == self.kind and self.calls[kind] == self.nth

    def finish(self) -> None:
        """Called where e3rl returned, in place of what Python does at its end."""

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _before(self, owner: Any, name: str, kind: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if self.reached(kind):
                self.die()
            return real(*arguments, **options)

        setattr(owner, name, call)

    def _halfway(self, owner: Any, name: str, kind: str, path_of: Callable[..., Path]) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            if self.reached(kind):
                write_half(path_of(*arguments))
                self.die()
            return result

        setattr(owner, name, call)

    def _half_deleted(self) -> None:
        real = shutil.rmtree

        def call(path: Any, *arguments: Any, **options: Any) -> None:
            files = [p for p in Path(path).rglob("*") if p.is_file()]
            if files and self.reached("delete a directory"):
                files[0].unlink()
                self.die()
            real(path, *arguments, **options)

        shutil.rmtree = call  # type: ignore[assignment]

    def _half_flushed(self) -> None:
        crash, real = self, journal.StepJournal.flush

        def call(self: journal.StepJournal) -> None:
            size = self.path.stat().st_size
            real(self)
            if crash.reached("write the journal"):
                os.truncate(self.path, (size + self.path.stat().st_size) // 2)
                crash.die()

        journal.StepJournal.flush = call  # type: ignore[method-assign]

    def install(self) -> None:
        """Wrap the calls by which things reach the disk, in this process."""
        self._before(os, "replace", "rename")
        self._before(os, "fsync", "sync")
        self._halfway(checkpoint, "save_file", "write a checkpoint", lambda tensors, path: path)
        self._halfway(pq, "write_table", "write rollouts", lambda table, path: path)
        self._halfway(Path, "write_text", "write a page or a record", lambda path, *_: path)
        self._half_deleted()
        self._half_flushed()


@dataclass
class Life:
    """How a process ended: its exit status, None by SIGKILL; the seconds; the candidates it generated for training."""

    status: int | None
    seconds: float
    generated: int


def live(command: list[str], log: Path, crash: Crash, patience: float | None = None) -> Life:
    """Fork, run ``e3rl`` with these arguments, and kill it after ``patience`` seconds."""
    counted = log.with_suffix(".generated")
    counted.write_bytes(b"")
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        be(command, log, crash)
    waited = status = 0
    while not waited:
        waited, status = os.waitpid(child, os.WNOHANG)
        if not waited and patience is not None and time.monotonic() - began > patience:
            os.kill(child, signal.SIGKILL)
            patience = None
        time.sleep(0.002)
    generated = len(counted.read_bytes())
    return Life(
        os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else None, time.monotonic() - began, generated
    )


def be(command: list[str], log: Path, crash: Crash) -> None:
    """Be e3rl, in a forked process: never returns. Beside the log it leaves how often it generated, and its calls."""
    counted = log.with_suffix(".generated")
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ["COLUMNS"] = "2000"  # sentences are not wrapped, so that they can be read here
        torch.set_num_threads(1)
        count = os.open(counted, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        real = journal.StepJournal.add

        def add(self: journal.StepJournal, *arguments: Any) -> None:
            os.write(count, b".")
            real(self, *arguments)

        journal.StepJournal.add = add  # type: ignore[method-assign]
        crash.install()
        status = e3rl(command)
        crash.finish()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if crash.nth == 0:
            log.with_suffix(".calls").write_text(json.dumps(crash.calls))
            log.with_suffix(".modules").write_text(json.dumps(sorted(sys.modules)))
        os._exit(status)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(70)


def preload(log: Path) -> None:
    """Import what a life that nothing ended has imported: those that are forked from now on need not do it again."""
    for name in json.loads(log.with_suffix(".modules").read_text()):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what depends on the clock and the machine."""
    return {k: v for k, v in record.items() if not k.startswith(("seconds", "tokens_per", "memory", "train_seconds"))}


def _rows(ledger: Path) -> list[dict[str, Any]] | None:
    """The rows of a rollout file; None where it can't be read."""
    try:
        return list(read_ledger(ledger).to_pylist())
    except UserError:
        return None


def outcome(run: Path) -> dict[str, Any]:
    """All that a finished run says, in bytes and values."""
    return {
        "weights": (run / "model" / "model.safetensors").read_bytes(),
        "metrics": [timeless(r) for r in read_lines(run / "metrics.jsonl")],
        "evaluations": read_lines(run / "evaluations.jsonl"),
        "rollouts": {p.name: _rows(p) for p in sorted((run / "rollouts").glob("*.parquet"))},
        "summary": timeless(json.loads((run / "summary.json").read_text(encoding="utf-8"))),
        "litter": sorted(str(p.relative_to(run)) for p in run.rglob("*.tmp")),
        "files": sorted(p.name for p in run.iterdir()),
    }


def differing(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What of two outcomes is not the same."""
    return [key for key, value in expected.items() if found[key] != value]


def _crashes(rng: random.Random, calls: dict[str, int], seconds: float) -> Iterator[tuple[str, Crash, float | None]]:
    """Endless ways to end a life: half of them by the clock, half at a call that writes."""
    kinds = sorted(calls)
    while True:
        yield "a moment", Crash(), rng.uniform(0, 0.6 * seconds)
        kind = rng.choice(kinds)
        yield kind, Crash(kind, rng.randint(1, max(1, calls[kind] // 2))), None


def chaos(
    directory: Path,
    kills: int,
    seed: int = 0,
    recipe: str = RECIPE,
    seconds: float = math.inf,
    say: Callable[[str], None] = print,
) -> Tally:
    """Kill runs that many times, or for so many seconds; each is then completed and compared with an undisturbed one."""
    path = directory / "recipe.toml"
    path.write_text(recipe, encoding="utf-8")

    def said(name: str) -> str:
        return (directory / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def begin(name: str, crash: Crash, patience: float | None = None) -> Life:
        resume = ["--resume"] * (directory / name / "config.toml").exists()
        command = ["train", str(path), f"run.output_dir={directory}", f"run.name={name}", *resume]
        return live(command, directory / f"{name}.log", crash, patience)

    first = begin("undisturbed", Crash())
    if first.status != 0:
        raise RuntimeError(said("undisturbed"))
    preload(directory / "undisturbed.log")
    expected = outcome(directory / "undisturbed")
    calls = json.loads((directory / "undisturbed.calls").read_text())
    ends = _crashes(random.Random(seed), calls, first.seconds)

    def one(name: str, left: int) -> Ended:
        where, crash, patience = next(ends) if left else ("", Crash(kind="none"), None)
        life = begin(name, crash, patience)
        generated = Counter({"candidates generated": life.generated})
        if life.status is None:
            return Ended(False, 1, where, counts=generated)
        return Ended(True, counts=generated, where=where, wrong=f"failed: {said(name)[-3000:]}" if life.status else "")

    def unlike(name: str) -> str:
        keys = differing(expected, outcome(directory / name))
        shutil.rmtree(directory / name)
        return ", ".join(keys)

    tally = kill_runs(kills, one, unlike, seconds, say)
    tally.counts["of them a second time"] = tally.counts["candidates generated"] - tally.runs * first.generated
    return tally


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no kill after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work here and leave everything")
    options = parser.parse_args()
    place = contextlib.nullcontext(str(options.keep)) if options.keep else tempfile.TemporaryDirectory()
    with place as directory:
        tally = chaos(Path(directory), options.kills, options.seed, seconds=options.seconds)
    print("\n".join(tally.lines()))
    raise SystemExit(bool(tally.wrong))


if __name__ == "__main__":
    main()
