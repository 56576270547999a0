"""A cell: one training and what is measured of it. Its address is a hash of its content, so studies share cells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from e3rl.config import Config, build_config, to_tables

FORMAT = 1

ERROR = "error.txt"
"""Why a cell failed, in its directory."""

Point = Literal["start", "steps", "tokens"]
"""When something is measured: on the first weights, after all steps, or when a budget of generated tokens is spent."""

_UNIMPORTANT = {
    "run": {"name", "output_dir"},
    "train": {"save_steps", "save_total_limit", "report_to", "parallel", "workers", "worker_gpus", "rank_timeout"},
    "rollout": {"max_rows", "cache_rows", "workers", "worker_gpus", "worker_timeout", "servers", "address"},
}
"""Settings that change where and how fast a cell runs, not what comes out."""


def _address(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Measure:
    """A function called as ``function(policy, config, **options)``; it returns plain JSON values.

    ``function`` is named ``package.module:name`` (or ``file.py:name``), so a study may bring its own.
    """

    function: str
    at: Point = "steps"
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def address(self) -> str:
        return _address([FORMAT, self.function, self.at, self.options])

    def to_table(self) -> dict[str, Any]:
        return {"function": self.function, "at": self.at, "options": dict(self.options)}


@dataclass(frozen=True)
class Cell:
    """One training, and what is measured of it.

    ``token_budget``: generated tokens (erased and dropped ones included) at which the weights are kept for measures at
    "tokens". A cell whose objective is 'vanilla' is not trained: all its points are the first weights. ``rollouts``: what makes
    the groups from the run's own rollouts, ``package.module:name``, called with the run; empty: nothing.
    """

    config: Config
    measures: tuple[Measure, ...]
    token_budget: int = 0
    rollouts: str = ""

    @property
    def trained(self) -> bool:
        return self.config.objective.name != "vanilla"

    @cached_property
    def address(self) -> str:
        """Hash of the training only: measures can be added to an existing cell. Settings at their defaults don't count,
        so that a new setting leaves old cells valid."""
        defaults = to_tables(Config())
        told = {
            section: {
                key: value
                for key, value in table.items()
                if key not in _UNIMPORTANT.get(section, ()) and defaults[section].get(key) != value
            }
            for section, table in to_tables(self.config).items()
        }
        return _address([FORMAT, told, self.token_budget, *filter(None, [self.rollouts])])

    def directory(self, out: Path) -> Path:
        return out / "cells" / self.address

    def to_table(self) -> dict[str, Any]:
        tables = to_tables(self.config)
        measures = [measure.to_table() for measure in self.measures]
        told = {"token_budget": self.token_budget, "rollouts": self.rollouts, "measures": measures}
        return {"format": FORMAT, "config": tables, **told}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Cell:
        measures = tuple(Measure(**measure) for measure in table["measures"])
        return cls(build_config(table["config"]), measures, table["token_budget"], table["rollouts"])

    def in_directory(self, directory: Path) -> Cell:
        """The cell with its run inside ``directory``."""
        run = replace(self.config.run, name="run", output_dir=str(directory))
        return replace(self, config=replace(self.config, run=run))


def merged(cells: Sequence[Cell]) -> list[Cell]:
    """Each training once, in the order of first mention, with the measures of all that share it."""
    found: dict[str, Cell] = {}
    for cell in cells:
        before = found.get(cell.address)
        if before is None:
            found[cell.address] = cell
        else:
            more = tuple(m for m in cell.measures if m.address not in {old.address for old in before.measures})
            found[cell.address] = replace(before, measures=before.measures + more)
    return list(found.values())


def read_measurement(cell: Cell, measure: Measure, out: Path) -> dict[str, Any] | None:
    """A measurement with its step and tokens; None if it was not taken yet."""
    path = cell.directory(out) / "measures" / f"{measure.address}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def missing(cell: Cell, out: Path) -> list[Measure]:
    """The cell's measures that have not been taken."""
    return [measure for measure in cell.measures if read_measurement(cell, measure, out) is None]
