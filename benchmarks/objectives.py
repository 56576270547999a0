"""Every objective on the embedded model at an equal number of generated tokens, several seeds.

    python benchmarks/objectives.py --json out.json          (half an hour on two cores)

Regenerated tokens are charged. Each run starts from the shipped weights and trains on the same problems in the same
order; what differs is the objective and, where it says so, erasing. SFT generates nothing: its demonstrations are charged.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from e3rl.train.summary import environment

PLAIN = ["rollout.erase=false"]
SFT_TOKENS_PER_STEP = 16 * 45  # a demonstration a problem, of 45 tokens at the training level

VARIANTS: dict[str, list[str]] = {
    "vanilla": ["--objective", "vanilla", *PLAIN],
    "grpo": ["--objective", "grpo", *PLAIN],
    "dr_grpo": ["--objective", "dr_grpo", *PLAIN],
    "dapo": ["--objective", "dapo", *PLAIN, "filter.name=mixed_accuracy", "rewards.overlong=true"],
    "gspo": ["--objective", "gspo", *PLAIN],
    "sapo": ["--objective", "sapo", *PLAIN],
    "erpo": ["--objective", "erpo", *PLAIN],
    "bapo": ["--objective", "bapo", *PLAIN],
    "disco": ["--objective", "disco", *PLAIN],
    "sft": ["--objective", "sft", *PLAIN],
    "grpo+erase+eps": ["--objective", "grpo"],
    "e3rl": ["--overlay", "paper-uncertainty"],
    "e3rl+eps": ["objective.erased=drop"],
    "e3rl+eps+contrast": [],
}
"""Arguments of `e3rl train demo` for each row. The demo's own judge is the perturbation alone."""


def run_one(name: str, seed: int, tokens: int, limit: int, directory: Path) -> dict[str, Any]:
    """Train one variant with one seed; returns its summary."""
    summary_file = directory / f"{name}-{seed}" / "summary.json"
    if summary_file.exists():  # of an earlier call with the same --runs
        return dict(json.loads(summary_file.read_text(encoding="utf-8")))
    steps = {"vanilla": 1, "sft": tokens // SFT_TOKENS_PER_STEP}.get(name, 100_000)
    command = [sys.executable, "-m", "e3rl", "train", "demo", *VARIANTS[name], f"train.steps={steps}", "--again"]
    command += [f"run.name={name}-{seed}", f"run.output_dir={directory}", f"run.seed={seed}"]
    command += [
        f"train.max_tokens={0 if name == 'sft' else tokens}",
        f"eval.limit={limit}",
        "train.save_steps=0",
        "train.warmup_ratio=0",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return dict(json.loads(summary_file.read_text(encoding="utf-8")))


def row(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, with the standard error of the mean for accuracies."""

    def figures(mode: str, key: str) -> dict[str, float]:
        values = [s["after"][mode][key] for s in summaries]
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return {"mean": mean(values), "error": error}

    return {
        "method": summaries[0]["method"],
        "seeds": len(summaries),
        "plain": {"avg@8": figures("plain", "avg@8"), "pass@8": figures("plain", "pass@8")},
        "erasable": {"avg@8": figures("erasable", "avg@8"), "pass@8": figures("erasable", "pass@8")},
        "steps": mean(s["steps"] for s in summaries),
        "tokens": mean(s["tokens_generated"] for s in summaries),
        "seconds": mean(s["train_seconds"] for s in summaries),
        "r": mean(s["r"] for s in summaries),
    }


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        "| run | method | plain Avg@8 | plain Pass@8 | erasable Avg@8 | erasable Pass@8 | steps | tokens | r |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, item in rows.items():
        cells = [
            f"{item[mode][key]['mean']:.3f} ± {item[mode][key]['error']:.3f}"
            for mode in ("plain", "erasable")
            for key in ("avg@8", "pass@8")
        ]
        numbers = f"{item['steps']:.0f} | {item['tokens']:.0f} | {item['r']:.3f}"
        lines.append(f"| {name} | {item['method']} | {' | '.join(cells)} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--limit", type=int, default=64, help="held-out problems")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--runs", type=Path, help="keep the runs here, and reuse those that are complete")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    jobs = [(name, seed) for seed in range(options.seeds) for name in options.only]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        directory = options.runs or Path(temporary)
        sizes = {"tokens": options.tokens, "limit": options.limit, "directory": directory}
        runs = pool.map(lambda job: run_one(job[0], job[1], **sizes), jobs)
        found = dict(zip(jobs, runs, strict=True))
    rows = {name: row([found[name, seed] for seed in range(options.seeds)]) for name in options.only}
    result = {"environment": environment(), "tokens": options.tokens, "problems": options.limit, "rows": rows}
    options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
