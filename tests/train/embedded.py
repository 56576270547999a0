"""A small run of the embedded model, what it leaves, and a listener that stops it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors.torch import load_file

from e3rl.config import Config, load_config
from e3rl.train.listeners import Silent
from e3rl.train.run_directory import read_lines

RECIPE = """
[data]
train = "lab:chain:1"
train_limit = 12
[rollout]
num_generations = 4
segment_length = 6
max_segments = 4
max_rows = 16
[erasure]
entropy_reference = "batch"
[rewards]
functions = ["lab"]
[train]
steps = 4
prompts_per_step = 3
learning_rate = 1e-4
save_steps = 2
eval_steps = 2
[eval]
limit = 4
num_samples = 2
"""


def embedded_config(tmp_path: Path, *overrides: str) -> Config:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    return load_config(recipe, [], [f"run.output_dir={tmp_path}", *overrides])


def _timeless(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if not k.startswith(("seconds", "tokens_per", "memory", "train_seconds"))}


def outcome(run: Path) -> dict[str, Any]:
    """Everything of a finished run that does not depend on the clock."""
    return {
        "weights": {k: v.tolist() for k, v in load_file(run / "model" / "model.safetensors").items()},
        "metrics": [_timeless(r) for r in read_lines(run / "metrics.jsonl")],
        "evaluations": read_lines(run / "evaluations.jsonl"),
        "rollouts": [pq.read_table(p).to_pylist() for p in sorted((run / "rollouts").glob("*.parquet"))],
        "summary": _timeless(json.loads((run / "summary.json").read_text())),
        "reference": json.loads((run / "model" / "e3rl_reference.json").read_text()),
    }


class StopAt(Silent):
    """Asks the run to stop, as Ctrl-C does, once it has heard the nth event of a kind."""

    def __init__(self, event: str, nth: int) -> None:
        self._event, self._left = event, nth

    def __getattribute__(self, name: str) -> Any:
        if name in ("stepped", "evaluated", "progressed") and name == object.__getattribute__(self, "_event"):
            return self._count
        return object.__getattribute__(self, name)

    def _count(self, *_: Any) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGINT)
