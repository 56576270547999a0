"""``make test-chaos``: all parts below, one after the other, with their figures."""

from __future__ import annotations

import os
import subprocess
import sys
import time

FUZZ_CASES = "100"

PARTS = {
    "kills": ["-m", "tests.chaos.kills", "--kills", "50", "--seconds", "360"],
    "full disks": ["-m", "tests.chaos.disk", "--sizes", "4", "3000", "9000", "17500"],
    "damaged files": ["-m", "tests.chaos.damage", "--seconds", "150"],
    "failing calls and power cuts": ["-m", "tests.chaos.faults", "--seconds", "120"],
    "a simulated cluster": ["-m", "tests.chaos.cluster", "--seeds", "1000"],
    "hostile answers": ["-m", "tests.chaos.hostile", "--inputs", "10000"],
    "fuzz": ["-m", "pytest", "-p", "no:xdist", "tests/fuzz"],
    "soak": ["-m", "tests.chaos.soak", "demo", "train.prompts_per_step=3", "rollout.num_generations=4",
             "train.eval_steps=0", "eval.limit=8", "--steps", "500", "--quiet"],
}  # fmt: skip


def main() -> None:
    """Run all parts; the exit code says whether all held."""
    environment = {**os.environ, "E3RL_FUZZ": FUZZ_CASES, "PYTHONUNBUFFERED": "1"}
    failed = []
    for name, arguments in PARTS.items():
        print(f"== {name}", flush=True)
        began = time.monotonic()
        done = subprocess.run([sys.executable, *arguments], env=environment, check=False)
        print(f"   {time.monotonic() - began:.0f} s", flush=True)
        failed += [name] * (done.returncode != 0)
    print("all held" if not failed else f"FAILED: {', '.join(failed)}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
