"""summary.json: what a run came to, from its logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from e3rl.config import Config
from e3rl.evaluate.figures import evaluated_name, overall
from e3rl.objectives import method_name
from e3rl.train.run_directory import read_lines


def run_summary(run: Path, config: Config, *, step: int, seconds: float, tokens: int) -> dict[str, Any]:
    """Before and after, r, erase rate and cost of a run that has done ``step`` steps."""
    records = read_lines(run / "evaluations.jsonl")
    lines = read_lines(run / "metrics.jsonl")

    def at(step: int) -> dict[str, Any]:
        """By mode; with several sources the mean, then each of them."""
        here = [r for r in records if r["step"] == step]
        ordered = [*overall(here), *(r for r in here if r not in overall(here))]
        return {evaluated_name(r): {k: v for k, v in r.items() if k != "step"} for r in ordered}

    def over_all(part: str, whole: str) -> float:
        return sum(line[part] for line in lines) / max(1, sum(line[whole] for line in lines))

    return {
        "method": method_name(config),
        "before": at(0),
        "after": at(step),
        "r": over_all("erased_tokens", "committed_tokens"),
        "erase_rate": over_all("erasures", "candidates"),
        "steps": step,
        "train_seconds": seconds,
        "tokens_generated": tokens,
    }
