"""Runs cells: ``python -m e3rl_reproduce.worker DIRECTORY…``; each directory holds cell.json.

Trains, or resumes an interrupted training, then takes each missing measure.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from e3rl.cli.train import launch
from e3rl.cluster.rollouts import generates_elsewhere
from e3rl.cluster.training_worker import Begin
from e3rl.errors import RunStopped, UserError
from e3rl.files import atomic_directory, write_json
from e3rl.models import Policy, load_policy
from e3rl.plugins import load
from e3rl.train.checkpoint import list_checkpoints
from e3rl.train.listeners import Silent
from e3rl.train.run_directory import continue_or_put_aside, read_lines
from e3rl.train.summary import environment
from e3rl.train.trainer import Trainer
from e3rl.weights.files import save_pretrained
from e3rl_reproduce.cells import ERROR, Cell, Point
from e3rl_reproduce.measures import EXAM

SNAPSHOT = "at-tokens"


class KeepWeights(Silent):
    """Saves the policy after the first step at which a budget of generated tokens is spent."""

    def __init__(self, budget: int, directory: Path) -> None:
        self._budget, self._directory = budget, directory
        self.policy: Policy | None = None

    def stepped(self, record: Mapping[str, Any]) -> None:
        if self.policy is None or not 0 < self._budget <= record["tokens_total"] or self._directory.exists():
            return
        with atomic_directory(self._directory) as temporary:
            save_pretrained(self.policy, temporary, "Weights at a budget of generated tokens.\n")
            write_json(temporary / "point.json", {"step": record["step"], "tokens": record["tokens_total"]})


def _train(cell: Cell, directory: Path) -> None:
    """Train to the end. A finished training keeps its weights but not its checkpoints, which are several times as large."""
    run = directory / "run"
    if not (run / "summary.json").exists() and cell.config.train.workers:
        if cell.token_budget:
            raise UserError("a cell with a token budget is trained in one process: leave train.workers at 0")
        launch(cell.config, Begin(again=True), Silent())
    elif not (run / "summary.json").exists():
        keep = KeepWeights(cell.token_budget, directory / SNAPSHOT)
        resume = continue_or_put_aside(cell.config)
        trainer = Trainer(cell.config, listeners=[keep], resume=resume)
        keep.policy = trainer.policy
        if cell.rollouts:
            trainer.run = replace(trainer.run, rollouts=load("rollouts", cell.rollouts, {})(trainer.run))
        trainer.train()
    for checkpoint in list_checkpoints(run):
        shutil.rmtree(checkpoint)


def _last(directory: Path) -> dict[str, int]:
    lines = read_lines(directory / "run" / "metrics.jsonl")
    return {"step": lines[-1]["step"], "tokens": lines[-1]["tokens_total"]}


def _weights(cell: Cell, point: Point, directory: Path) -> tuple[Path | None, dict[str, int]]:
    """Where the weights of a point are (None: the model's own), and its step and tokens."""
    if point == "start" or not cell.trained:
        return None, {"step": 0, "tokens": 0}
    snapshot = directory / SNAPSHOT
    if point == "tokens" and snapshot.exists():
        return snapshot, dict(json.loads((snapshot / "point.json").read_text(encoding="utf-8")))
    return directory / "run" / "model", _last(directory)


def run_cell(directory: Path) -> None:
    """Run what is missing of a cell."""
    cell = Cell.from_table(json.loads((directory / "cell.json").read_text(encoding="utf-8"))).in_directory(directory)
    if cell.trained:
        _train(cell, directory)
    for measure in cell.measures:
        path = directory / "measures" / f"{measure.address}.json"
        if path.is_file():
            continue
        weights, place = _weights(cell, measure.at, directory)
        model = cell.config.model
        if measure.function == EXAM and generates_elsewhere(cell.config):
            model = replace(model, device="cpu")  # workers use the devices; this copy is sent to them
        policy = load_policy(model, directory=weights)
        values = load("measure", measure.function, {})(policy, cell.config, **measure.options)
        write_json(path, {**measure.to_table(), **place, "values": values, "environment": environment()})


def main() -> int:
    """Exit code 0, 2 where cells failed (a sentence each in their logs), or 130 after a requested stop."""
    failed = False
    for directory in map(Path, sys.argv[1:]):
        try:
            run_cell(directory)
        except RunStopped as stop:
            print(f"e3rl: {stop}", file=sys.stderr)
            return 130
        except Exception as error:  # a cell may fail in any way; the others of this process go on
            failed = True
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            (directory / ERROR).write_text(f"{kind}{error}\n", encoding="utf-8")
            if kind:
                traceback.print_exc()
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
