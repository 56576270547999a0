"""SmolLM2-135M on 100 problems of GSM8K × 4, plain and with erasable decoding at an equal budget of tokens.

``python benchmarks/smollm2_gsm8k.py DIRECTORY`` runs (or goes on with) the evaluation into DIRECTORY, a quarter of an hour on
two cores. GSM8K comes from the hub, or with ``--data-dir``. At the end it prints the page docs/results/smollm2-gsm8k.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

SETTINGS = [
    "eval.limit=100", "eval.num_samples=4", "eval.temperature=0.6", "eval.top_p=0.95", "rollout.segment_length=32",
    "rollout.max_segments=8", "rollout.max_rows=32", "rollout.cache_rows=64", "erasure.kappa0=1.5",
]  # fmt: skip


def command(directory: Path, data_dir: str | None) -> list[str]:
    """The evaluation, as it is called."""
    where = ["--data-dir", data_dir] if data_dir else []
    return ["e3rl", "eval", "smollm2", "gsm8k", "--erase", *where, "--output", str(directory), *SETTINGS]


def row(name: str, record: dict[str, Any]) -> str:
    """One line of the table."""
    low, high = record["ci95"]
    cost = record["tokens_per_correct"]
    cells = [
        name,
        f"{record['avg@4']:.3f} ({low:.3f}–{high:.3f})",
        f"{record['pass@4']:.3f}",
        f"{record['maj']['4']['value']:.3f}",
        f"{record['finish_ratio']:.2f}",
        f"{record['length']:.0f}",
        f"{record['erase_rate']:.3f}",
        f"{record['r']:.2f}",
        "–" if cost is None else f"{cost:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def page(found: dict[str, Any], commit: str) -> str:
    """The results page."""
    budget = found["equal_budget"]
    lines = [
        "# SmolLM2-135M on GSM8K",
        "",
        f"`{' '.join(command(Path('DIRECTORY'), None))}`:",
        "100 problems of the test set, evenly spread, × 4 samples of at most 256 tokens; 2 cores of a shared x86 cloud machine,",
        f"torch {version('torch')}, transformers {version('transformers')}, commit {commit}.",
        "The page is printed by `python benchmarks/smollm2_gsm8k.py DIRECTORY`. Intervals are 95 %, over problems.",
        "",
        "| decoding | Avg@4 | Pass@4 | Maj@4 | finished | length | erase rate | r | tokens per right answer |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        row("plain", found["plain"]),
        row("erasable", found["erasable"]),
        "",
        f"At {budget['tokens_per_problem']:.0f} tokens a problem, so {budget['erasable_samples']} erasable or "
        f"{budget['plain_samples']:.2f} plain samples:",
        "",
        "| figure | erasable | plain | difference | 95 % | p |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in ("avg", "pass", "maj"):
        one, difference = budget[name], budget[name]["difference"]
        low, high = difference["interval"]
        lines.append(
            f"| {name} | {one['erasable']:.3f} | {one['plain']:.3f} | {difference['mean']:+.3f} | {low:+.3f} to {high:+.3f} | "
            f"{difference['p']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Evaluate, then print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--data-dir", help="where gsm8k_test.jsonl lies")
    parser.add_argument("--stop-after", type=float, help="begin no problem later than after so many seconds")
    options = parser.parse_args()
    limit = ["--stop-after", str(options.stop_after)] if options.stop_after else []
    call = [sys.executable, "-m", *command(options.directory, options.data_dir), *limit]
    subprocess.run(call, check=True, stdout=sys.stderr)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(page(json.loads((options.directory / "evaluation.json").read_text(encoding="utf-8")), commit), end="")


if __name__ == "__main__":
    main()
