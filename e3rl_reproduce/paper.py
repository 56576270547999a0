"""The papers' numbers (of tables; their figures state none) and the set-up that they state, as data."""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e3rl.config import Config, to_tables
from e3rl.objectives import options

HERE = Path(__file__).parent


@functools.cache
def _tables() -> dict[str, Any]:
    return dict(json.loads((HERE / "paper.json").read_text(encoding="utf-8")))


def paper_models(table: str) -> list[str]:
    """The models that a table has, as the paper names them."""
    return list(_tables().get(table, {}))


def paper_row(table: str, model: str, row: str) -> Mapping[str, Mapping[str, float | None]]:
    """Benchmark to metric to value; empty where the paper has no such row."""
    return dict(_tables().get(table, {}).get(model, {}).get(row, {}))


def paper_mean(table: str, model: str, row: str, metric: str) -> float | None:
    """Mean over the benchmarks; None where the paper leaves a value out."""
    values = [value.get(metric) for value in paper_row(table, model, row).values()]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


@dataclass(frozen=True)
class Stated:
    """A sentence of a paper, the settings that follow from it, and how it is read where it can be read in several ways."""

    quote: str
    settings: Mapping[str, Any]
    reading: str = ""


@dataclass(frozen=True)
class Filled:
    """Settings that a paper does not state, with the values that the recipes have."""

    settings: Mapping[str, Any]
    why: str


@functools.cache
def _stated() -> dict[str, Any]:
    return tomllib.loads((HERE / "stated.toml").read_text(encoding="utf-8"))


def stated(part: str) -> list[Stated]:
    """What 'e3rl' or 'erpo' states, or 'topology': of the first paper's machines."""
    return [Stated(**entry) for entry in _stated()[part]]


def filled(part: str) -> list[Filled]:
    """What the recipes of 'e3rl' or 'erpo' set in addition."""
    return [Filled(**entry) for entry in _stated()["filled"][part]]


def paper_of(recipe: str) -> str:
    """The part of the table that a recipe's name belongs to."""
    return "erpo" if recipe.startswith("erpo-") else "e3rl"


def setting_of(config: Config, name: str) -> Any:
    """The value of ``section.field``; of an objective's option also where it is the objective's own default."""
    section, field = name.split(".")
    value = to_tables(config)[section].get(field)
    if section == "objective" and value is None:
        value = next((option.default for option in options(config.objective.name) if option.name == field), None)
    return list(value) if isinstance(value, tuple) else value


def deviations(config: Config, entries: Sequence[Stated | Filled], *, but: Collection[str] = ()) -> list[str]:
    """A sentence for each setting of a resolved recipe that differs from the entries. ``but``: settings that a row varies.

    A list is a value if the setting is a list, else alternatives. Options that the objective lacks are skipped.
    """
    found = []
    for entry in entries:
        said = f": “{entry.quote}”" if isinstance(entry, Stated) else ""
        for name, wanted in entry.settings.items():
            value = setting_of(config, name)
            same = value in wanted if isinstance(wanted, list) and not isinstance(value, list) else value == wanted
            absent = name.startswith("objective.") and value is None
            if not (same or absent or name in but):
                found.append(f"{name} is {value!r}, not {wanted!r}{said}")
    return found
