"""The demo over several seeds: held-out accuracy before and after, plain and erasable, and the time it takes.

python benchmarks/demo.py --json out.json          (ten minutes on two cores)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from e3rl.train.summary import environment


def run_one(seed: int, directory: Path) -> dict[str, Any]:
    """The demo with one seed: its summary, and seconds from start to end, imports and evaluations included."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "e3rl", "train", "demo", f"run.seed={seed}", f"run.name=demo-{seed}"]
    subprocess.run([*command, f"run.output_dir={directory}"], check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((directory / f"demo-{seed}" / "summary.json").read_text(encoding="utf-8"))
    return {**summary, "seed": seed, "seconds": time.perf_counter() - began}


def markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """One row a seed, and their means."""
    columns = [(when, mode) for mode in ("plain", "erasable") for when in ("before", "after")]
    lines = [
        "| seed | " + " | ".join(f"{mode}, {when}: Avg@8 / Pass@8" for when, mode in columns) + " | r | seconds |",
        "| --- " * (len(columns) + 3) + "|",
    ]
    for run in runs:
        cells = [f"{run[when][mode]['avg@8']:.3f} / {run[when][mode]['pass@8']:.3f}" for when, mode in columns]
        lines.append(f"| {run['seed']} | {' | '.join(cells)} | {run['r']:.3f} | {run['seconds']:.0f} |")
    means = [
        f"{mean(r[when][mode]['avg@8'] for r in runs):.3f} / {mean(r[when][mode]['pass@8'] for r in runs):.3f}"
        for when, mode in columns
    ]
    seconds, r = mean(run["seconds"] for run in runs), mean(run["r"] for run in runs)
    return "\n".join([*lines, f"| mean | {' | '.join(means)} | {r:.3f} | {seconds:.0f} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        runs = [run_one(seed, Path(directory)) for seed in range(options.seeds)]
    options.json.write_text(json.dumps({"environment": environment(), "runs": runs}, indent=2), encoding="utf-8")
    print(markdown(runs))


if __name__ == "__main__":
    main()
