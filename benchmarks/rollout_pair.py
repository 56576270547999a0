"""Rollouts of two checkouts in turns: whether a change made them slower.

python benchmarks/rollout_pair.py BEFORE AFTER        (five minutes on two quiet cores; each has a .venv with e3rl)

A process of each checkout loads the model and waits; both are asked in turns, so that what else the machine does meets both.
A figure above 1 means that AFTER is slower.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

MODELS = {"lab": 1.5, "qwen3-3m": 1.0}
"""With the threshold's kappa at which `benchmarks/rollout.py` erases between 10 and 30 % of segments."""
WAYS = ("erasing", "plain")


class Checkout:
    """A checkout's rollouts, in a process of their own."""

    def __init__(self, root: Path, model: str) -> None:
        command = [str(root / ".venv/bin/python"), __file__, "--answer", str(root), model]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=environment
        )
        assert self._line() == "ready", f"{root} does not start"

    def seconds(self, way: str) -> float:
        """Roll out once."""
        assert self._process.stdin is not None
        print(way, file=self._process.stdin, flush=True)
        return float(self._line())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def answer(root: Path, name: str) -> None:
    """The process of a checkout: the seconds of a batch of rollouts for each line that it reads."""
    sys.path[:0] = [str(root / "benchmarks"), str(root)]
    import rollout
    import torch

    torch.set_num_threads(2)
    model = rollout.load(name)
    vocabulary = model.config.vocab_size
    erasure = rollout.ErasureConfig(kappa0=MODELS[name], max_erasures=5)
    engine = rollout._rollout_engine(model, rollout._ending(vocabulary))
    settings = {"erasing": rollout.ROLLOUT, "plain": rollout.replace(rollout.ROLLOUT, erase=False)}
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        rollout._roll(engine, settings[line.strip()], erasure, vocabulary)
        print(time.perf_counter() - began, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?")
    parser.add_argument("after", type=Path, nargs="?", default=Path())
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--answer", nargs=2, metavar=("ROOT", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        return answer(Path(options.answer[0]), options.answer[1])
    if options.before is None:
        parser.error("name a checkout to compare with")
    for model in MODELS:
        before, after = (Checkout(root.resolve(), model) for root in (options.before, options.after))
        ratios: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(options.rounds + 1):
            for way, found in ratios.items():
                sides = (before, after) if number % 2 else (after, before)
                spent = {side: side.seconds(way) for side in sides}
                if number:  # the first warms up
                    found.append(spent[after] / spent[before])
        for way, found in ratios.items():
            print(f"{model}, {way}: {median(found):.3f} ({min(found):.2f} to {max(found):.2f})", flush=True)
        before.close()
        after.close()


if __name__ == "__main__":
    main()
