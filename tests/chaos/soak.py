"""A long run watched from inside: memory, processes, threads and open files at every step.

    python -m tests.chaos.soak --steps 500 --json out.json [RECIPE section.field=value …]

The slope is that of a straight line through the process's own memory after the first fifth of the steps, in MB per 100 steps.
Own means anonymous: pages of files are the kernel's, which drops them and reads them again as it likes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from e3rl.cli.recipes import find_recipe
from e3rl.config import load_config
from e3rl.train.listeners import Silent

LARGEST_SLOPE = 1.0
"""MB of own memory per 100 steps."""

WARM_UP = 0.2
"""Share of the steps in which caches, pools and the allocator fill."""


def resident_mb(kind: str = "VmRSS") -> float:
    """Resident memory of this process; with ``RssAnon`` without the pages of files."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status names no {kind}")


def children() -> list[int]:
    """Process ids of this process's children, zombies included."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.append(int(status.parent.name))
    return found


def held() -> dict[str, float]:
    """What this process holds now."""
    return {
        "rss_mb": resident_mb(),
        "own_mb": resident_mb("RssAnon"),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "children": len(children()),
    }


class Watch(Silent):
    """Notes what is held after every step."""

    def __init__(self, say_every: int = 0) -> None:
        self.seen: list[dict[str, float]] = []
        self._say_every = say_every

    def stepped(self, record: Mapping[str, Any]) -> None:
        self.seen.append({"step": record["step"], **held()})
        if self._say_every and record["step"] % self._say_every == 0:
            print(json.dumps(self.seen[-1]), flush=True)


def slope_per_100(seen: list[dict[str, float]]) -> float:
    """MB of own memory per 100 steps, after the warm-up."""
    settled = seen[int(len(seen) * WARM_UP) :]
    fit = statistics.linear_regression([s["step"] for s in settled], [s["own_mb"] for s in settled])
    return 100 * fit.slope


def soak(recipe: str, steps: int, overrides: list[str], say_every: int = 0) -> dict[str, Any]:
    """Train, and say what grew."""
    from e3rl.report.trackers import ReportListener
    from e3rl.train.trainer import Trainer

    with tempfile.TemporaryDirectory() as directory:
        own = [f"run.output_dir={directory}", f"train.steps={steps}", "train.epochs=100000"]
        config = load_config(find_recipe(recipe), [], [*own, *overrides])
        watch = Watch(say_every)
        before = held()
        trainer = Trainer(config, listeners=[watch, ReportListener(print)])
        trainer.train()
        del trainer
        after = held()
    growth = {
        kind: watch.seen[-1][kind] - watch.seen[len(watch.seen) // 5][kind] for kind in ("files", "threads", "children")
    }
    return {
        "steps": len(watch.seen),
        "slope_mb_per_100": slope_per_100(watch.seen),
        **{kind: [watch.seen[len(watch.seen) // 5][kind], watch.seen[-1][kind]] for kind in ("rss_mb", "own_mb")},
        "growth": growth,
        "left": {kind: after[kind] - before[kind] for kind in ("threads", "children")},
        "seen": watch.seen,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--quiet", action="store_true", help="say only what came of it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = soak(options.recipe, options.steps, options.overrides, say_every=0 if options.quiet else 10)
    if options.json:
        options.json.write_text(json.dumps(result), encoding="utf-8")
    del result["seen"]
    print(json.dumps(result))
    raise SystemExit(result["slope_mb_per_100"] >= LARGEST_SLOPE or any(result["growth"].values()))


if __name__ == "__main__":
    main()
