"""Runs whose rollouts vLLM generates, killed in the middle of segments: the run itself, vLLM's engine or its worker.

    python -m tests.chaos.vllm_engine --kills 50

It needs the environment of `make test-vllm`. A run that loses a process of vLLM's must end with a sentence; none may leave a
process or a copy of its weights behind; the resumed run must be the undisturbed one.
"""

from __future__ import annotations

import argparse
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
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.killing import Ended, Tally, kill_runs
from tests.chaos.kills import Crash, Life, differing, live, outcome, preload
from tests.chaos.trials import TINY

PATIENCE = 90.0
"""Seconds in which the processes of a killed run have to be gone."""

VICTIMS = ("the run", "VLLM::EngineCore", "VLLM::Worker")
MARK = "E3RL_CHAOS_RUN"


def processes(mark: str) -> dict[int, str]:
    """The processes that were started with this mark in their environment, and their titles."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
    return found


@dataclass
class EngineCrash(Crash):
    """Kills one of the processes of a run, some time after the nth step that vLLM was asked for."""

    victim: str = VICTIMS[0]
    seconds: float = 0.0
    mark: str = ""
    directory: Path = Path()

    def install(self) -> None:
        from e3rl.engine.vllm.core import VllmCore

        os.environ |= {MARK: self.mark, "TMPDIR": str(self.directory)}
        tempfile.tempdir = None
        step = VllmCore._step

        def stepping(core: VllmCore) -> None:
            if self.reached("step"):
                threading.Timer(self.seconds, self._strike).start()
            step(core)

        VllmCore._step = stepping  # type: ignore[method-assign]

    def _strike(self) -> None:
        if self.victim == VICTIMS[0]:
            self.die()
        for pid, title in processes(self.mark).items():
            if title.startswith(self.victim):
                os.kill(pid, signal.SIGKILL)


def left_behind(mark: str, directory: Path) -> str:
    """What a life left behind that ended some time ago; empty where nothing."""
    end = time.monotonic() + PATIENCE
    while (left := processes(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    weights = sorted(p.name for p in directory.rglob("*.safetensors"))
    return ", ".join([*left.values(), *weights])


def verdict(life: Life, victim: str, said: str) -> str:
    """Why a life that may have lost ``victim`` ended wrongly; empty where it did not."""
    if life.status == 0 or (life.status is None and victim == VICTIMS[0]):
        return ""
    if life.status == 2 and victim != VICTIMS[0] and "e3rl: a process of vLLM's has died" in said:
        return "a traceback" if "\nTraceback" in said else ""
    return f"exit {life.status}"


def chaos(directory: Path, kills: int, seconds: float, seed: int = 0, say: Callable[[str], None] = print) -> Tally:
    """Kill that many times, or for so many seconds; every run is compared with an undisturbed one."""
    recipe, rng = directory / "recipe.toml", random.Random(seed)
    recipe.write_text(TINY.replace("[rollout]", '[rollout]\nengine = "vllm"'), encoding="utf-8")
    (scratch := directory / "scratch").mkdir()

    def begin(name: str, crash: EngineCrash) -> tuple[Life, str]:
        resume = ["--resume"] * (directory / name / "config.toml").exists()
        log = directory / f"{name}.log"
        log.unlink(missing_ok=True)
        command = ["train", str(recipe), f"run.output_dir={directory}", f"run.name={name}", *resume]
        return live(command, log, crash), log.read_text(encoding="utf-8", errors="replace")

    def harmless(name: str) -> EngineCrash:
        return EngineCrash(mark=name, directory=scratch)

    first, said = begin("undisturbed", harmless("undisturbed"))
    if first.status != 0:
        raise RuntimeError(said)
    preload(directory / "undisturbed.log")
    expected = outcome(directory / "undisturbed")
    steps = json.loads((directory / "undisturbed.calls").read_text())["step"]

    def one(name: str, left: int) -> Ended:
        victim, where = rng.choice(VICTIMS), rng.randint(1, max(1, steps // 2))
        crash = EngineCrash("step", where, victim=victim, seconds=rng.uniform(0, 0.03), mark=name, directory=scratch)
        life, said = begin(name, crash if left else harmless(name))
        wrong = verdict(life, victim if left else "", said) or left_behind(name, scratch)
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
