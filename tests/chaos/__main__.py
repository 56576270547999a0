"""``make test-chaos``: all parts below, one after the other, with their figures.

``--scale 10`` tries ten times as much in ten times the time; parts can be named to run them alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time


def parts(scale: float) -> dict[str, list[str]]:
    """What each part is called with."""

    def of(count: int) -> str:
        return str(max(1, round(count * scale)))

    return {
        "kills": ["-m", "tests.chaos.kills", "--kills", of(50), "--seconds", of(240)],
        "kills of ranks": ["-m", "tests.chaos.ranks", "--kills", of(16)],
        "kills with vLLM": ["-m", "tests.chaos.vllm_engine", "--kills", of(4), "--seconds", of(120)],
        "full disks": ["-m", "tests.chaos.disk", "--sizes", "4", "3000", "9000", "17500"],
        "damaged files": ["-m", "tests.chaos.damage", "--seconds", of(120)],
        "failing calls and power cuts": ["-m", "tests.chaos.faults", "--seconds", of(90)],
        "a simulated cluster": ["-m", "tests.chaos.cluster", "--seeds", of(700)],
        "neighbours": ["-m", "tests.chaos.neighbours", "--requests", of(500)],
        "canary": ["-m", "tests.chaos.canary"],
        "hostile answers": ["-m", "tests.chaos.hostile", "--inputs", of(10_000)],
        "fuzz": ["-m", "pytest", "-p", "no:xdist", "tests/fuzz"],
        "soak": ["-m", "tests.chaos.soak", "demo", "train.prompts_per_step=3", "rollout.num_generations=4",
                 "train.eval_steps=0", "eval.limit=8", "--steps", str(max(1000, round(1000 * scale))), "--quiet"],
    }  # fmt: skip


def main() -> None:
    """Run the parts; the exit code says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts(1))}; all if none is named")
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    known = parts(options.scale)
    if unknown := set(options.parts) - known.keys():
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    environment = {**os.environ, "E3RL_FUZZ": str(max(1, round(100 * options.scale))), "PYTHONUNBUFFERED": "1"}
    failed = []
    for name in options.parts or known:
        print(f"== {name}", flush=True)
        began = time.monotonic()
        done = subprocess.run([sys.executable, *known[name]], env=environment, check=False)
        print(f"   {time.monotonic() - began:.0f} s", flush=True)
        failed += [name] * (done.returncode != 0)
    print("all held" if not failed else f"FAILED: {', '.join(failed)}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
