"""Two ranks that train together, one of them or both killed at random, again and again: the run must end in the same bits.

    python -m tests.chaos.ranks --kills 50

The ranks are forked processes that speak over gloo. When one is killed, the other must end by itself, with a sentence.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.killing import Ended, Tally, kill_runs
from tests.chaos.kills import RECIPE, Crash, be, differing, outcome, preload

RANKS = 2
PATIENCE = 90.0
"""Seconds in which a rank has to notice that the other is gone."""


@dataclass
class Lives:
    """How the ranks ended: their statuses, None by SIGKILL, -1 for one that waited for ever; and the seconds it took."""

    statuses: list[int | None]
    seconds: float


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def live_together(command: list[str], log: Path, crashes: list[Crash], patience: float, victims: list[int]) -> Lives:
    """Fork the ranks; after ``patience`` seconds the victims are killed."""
    began, port = time.monotonic(), _free_port()
    left: dict[int, int] = {}
    for rank, crash in enumerate(crashes):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(crashes))}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            name = log.stem if rank == 0 else f"{log.stem}-rank{rank}"
            be(command, log.with_name(f"{name}.log"), crash)
        left[child] = rank
    statuses: list[int | None] = [-1] * len(crashes)
    alone = math.inf
    while left and time.monotonic() < alone:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in left:
            statuses[left.pop(child)] = os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else None
            alone = min(alone, time.monotonic() + PATIENCE)
        if time.monotonic() - began > patience:
            patience = math.inf
            for child in [c for c, rank in left.items() if rank in victims]:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    for child in left:  # they waited for ever
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return Lives(statuses, time.monotonic() - began)


def _ends(
    rng: random.Random, calls: list[dict[str, int]], seconds: float
) -> Iterator[tuple[str, list[Crash], float, list[int]]]:
    """Endless ways to end: one rank or both by the clock, or one at a call that writes."""
    while True:
        victims = rng.choice([[0], [1], [0, 1]])
        yield f"ranks {victims} at a moment", [Crash(), Crash()], rng.uniform(0, 0.7 * seconds), victims
        rank = rng.randrange(RANKS)
        kind = rng.choice(sorted(calls[rank]) or ["sync"])
        crashes = [Crash(), Crash()]
        crashes[rank] = Crash(kind, rng.randint(1, max(1, calls[rank][kind] // 2)))
        yield f"rank {rank} at {kind}", crashes, math.inf, []


def chaos(
    directory: Path, kills: int, parallel: str = "ddp", seed: int = 0, say: Callable[[str], None] = print
) -> Tally:
    """Kill runs that many times; each is then completed and compared with an undisturbed one."""
    recipe = directory / "recipe.toml"
    recipe.write_text(RECIPE, encoding="utf-8")

    def live(name: str, crashes: list[Crash], patience: float = math.inf, victims: list[int] | None = None) -> Lives:
        resume = ["--resume"] * (directory / name / "config.toml").exists()
        settings = [f"run.output_dir={directory}", f"run.name={name}", f"train.parallel={parallel}"]
        log = directory / f"{name}.log"
        return live_together(["train", str(recipe), *settings, *resume], log, crashes, patience, victims or [])

    def said(name: str) -> str:
        return "".join(p.read_text(errors="replace")[-2000:] for p in sorted(directory.glob(f"{name}*.log")))

    first = live("undisturbed", [Crash(), Crash()])
    if first.statuses != [0, 0]:
        raise RuntimeError(said("undisturbed"))
    preload(directory / "undisturbed.log")
    expected = outcome(directory / "undisturbed")
    calls = [json.loads((directory / f"undisturbed{rank}.calls").read_text()) for rank in ("", "-rank1")]
    ends = _ends(random.Random(seed), calls, first.seconds)

    def one(name: str, left: int) -> Ended:
        where, crashes, patience, victims = next(ends) if left else ("", [Crash(), Crash()], math.inf, [])
        lives = live(name, crashes, patience, victims)
        killed = lives.statuses.count(None)
        survivors = [status for status in lives.statuses if status is not None]
        complete, wrong = lives.statuses == [0, 0], ""
        if not complete and (not killed or not set(survivors) <= {0, 2} or "Traceback" in said(name)):
            wrong = f"statuses {lives.statuses}: {said(name)}"
        return Ended(
            complete, killed, where, wrong, Counter({"the other rank ended with a sentence": survivors.count(2)})
        )

    def unlike(name: str) -> str:
        keys = differing(expected, outcome(directory / name))
        shutil.rmtree(directory / name)
        return ", ".join(keys)

    return kill_runs(kills, one, unlike, say=say)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--parallel", default="ddp")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = chaos(Path(directory), options.kills, options.parallel, options.seed)
    print("\n".join(found.lines()))
    raise SystemExit(bool(found.wrong))


if __name__ == "__main__":
    main()
