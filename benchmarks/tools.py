"""Levels of erasing tool calls on the embedded model, at an equal number of generated tokens, several seeds.

    python benchmarks/tools.py --json out.json          (about an hour on two cores)

Each run is `e3rl train tools-demo` on books that are checked at the end (``late``) or at once (``early``), from the shipped
weights, with the same problems in the same order. ``none`` decodes plainly, ``A`` judges a call before it is made, ``B`` takes a
turn back after its result, ``A+B`` does both. Erased tokens are charged.
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
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from e3rl.train.run_directory import read_lines
from e3rl.train.summary import environment

DATA = {"late": "lab:books:4", "early": "lab:books:2"}
B = ["environments.erase=errors"]
LEVELS = {
    "none": ["rollout.erase=false"],
    "A": [],
    "B": [*B, "erasure.max_erasures=0"],
    "A+B": B,
}
"""Arguments of `e3rl train tools-demo`. Level B needs a judged rollout, so it alone is one with a budget of 0 for segments."""


def run_one(data: str, level: str, seed: int, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Train once; the summary, and of metrics.jsonl what concerns calls, first and last tenth of the steps."""
    name = f"{data}-{level}-{seed}"
    path = directory / name
    if not (path / "summary.json").exists():  # of an earlier call with the same --runs
        command = [sys.executable, "-m", "e3rl", "train", "tools-demo", *LEVELS[level], f"data.train={DATA[data]}"]
        command += [f"run.name={name}", f"run.output_dir={directory}", f"run.seed={seed}", "--again"]
        command += ["train.steps=100000", f"train.max_tokens={options.tokens}", "train.warmup_ratio=0"]
        command += ["train.save_steps=0", f"eval.limit={options.limit}", f"train.prompts_per_step={options.prompts}"]
        command += [f"eval.erasable={str(options.erasable).lower()}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    summary = dict(json.loads((path / "summary.json").read_text(encoding="utf-8")))
    lines = read_lines(path / "metrics.jsonl")
    few = max(1, len(lines) // 10)
    names = ("reward", "calls", "call_errors", "erased_turns", "erasures", "r", "seconds_tools")
    course = {n: [mean(line[n] for line in part) for part in (lines[:few], lines[-few:])] for n in names}
    return {"summary": summary, "course": course}


def row(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds; with the standard error of the mean for accuracies."""

    def after(mode: str, key: str) -> str:
        values = [run["summary"]["after"][mode][key] for run in runs]
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return f"{mean(values):.3f} ± {error:.3f}"

    def course(key: str) -> str:
        first, last = (mean(run["course"][key][i] for run in runs) for i in (0, 1))
        return f"{first:.3g} → {last:.3g}"

    return {
        "plain before": f"{mean(run['summary']['before']['plain']['avg@8'] for run in runs):.3f}",
        "plain after": after("plain", "avg@8"),
        "Pass@8": after("plain", "pass@8"),
        **({"erasable after": after("erasable", "avg@8")} if "erasable" in runs[0]["summary"]["after"] else {}),
        "training reward": course("reward"),
        "calls": course("calls"),
        "errors": course("call_errors"),
        "erased calls a step": course("erased_turns"),
        "erased segments a step": course("erasures"),
        "steps": f"{mean(run['summary']['steps'] for run in runs):.0f}",
        "r": f"{mean(run['summary']['r'] for run in runs):.3f}",
    }


def markdown(rows: Mapping[str, Mapping[str, str]]) -> str:
    """The rows as a table."""
    columns = list(next(iter(rows.values())))
    lines = [f"| books, level | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(item.values())} |" for name, item in rows.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a step")
    parser.add_argument("--limit", type=int, default=96, help="held-out problems")
    parser.add_argument("--erasable", action="store_true", help="evaluate erasable decoding as well")
    parser.add_argument("--books", nargs="*", choices=DATA, default=list(DATA))
    parser.add_argument("--only", nargs="*", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--runs", type=Path, help="keep the runs here, and reuse those that are complete")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.runs or Path(temporary)
        found: dict[str, list[dict[str, Any]]] = {}
        for seed in range(options.seeds):
            for data in options.books:
                for level in options.only:
                    runs = found.setdefault(f"{data}, {level}", [])
                    runs.append(run_one(data, level, seed, options, directory))
    rows = {name: row(runs) for name, runs in found.items()}
    result = {"environment": environment(), "tokens": options.tokens, "rows": rows, "runs": found}
    options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
