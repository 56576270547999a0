"""What is saved beside a model so that it can be decoded with erasure: calibration statistics, and the settings they fit.

A model's directory may come from anyone, so the settings in it are numbers and choices of decoding and nothing else. Code that
they name runs only where the caller names it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from e3rl.config import (
    Config,
    ErasureConfig,
    RolloutConfig,
    build_config,
    layered,
    tables_to_toml,
    to_tables,
)
from e3rl.errors import UserError
from e3rl.files import write_text
from e3rl.parsing import read_tables
from e3rl.plugins import foreign_code, require_named
from e3rl.rollout.statistics import FILE_NAME, CalibrationStatistics
from e3rl.sections import build_section, current_names

RECIPE_NAME = "e3rl_recipe.toml"
SAVED: Mapping[str, tuple[str, ...]] = {
    "rollout": (
        *("erase", "num_generations", "segment_length", "max_segments", "max_completion_length"),
        *("boundary", "boundary_level", "min_segment_length"),
        *("temperature", "top_p", "top_k", "max_rows", "cache_rows", "kv_budget"),
    ),
    "erasure": tuple(f.name for f in fields(ErasureConfig)),
}
"""Fields that are saved beside a model, and the only ones that are taken from there."""


@dataclass(frozen=True)
class Companions:
    """Either is None where the model has none. ``recipe`` is a file that may come from anyone."""

    recipe: Path | None
    calibration: CalibrationStatistics | None

    def config(
        self,
        overlays: Sequence[Path] = (),
        overrides: Sequence[str] = (),
        say: Callable[[str], object] = lambda line: None,
    ) -> Config:
        """The saved settings of decoding with the caller's own laid over them.

        UserError where the file sets anything but decoding, or names code that the caller doesn't name too. ``say`` gets a line
        for every other setting that is passed over.
        """
        own = layered({}, overlays, overrides)
        saved = _saved_settings(self.recipe, own, say) if self.recipe else {}
        return build_config(layered(saved, overlays, overrides))


def _saved_settings(path: Path, own: Mapping[str, Any], say: Callable[[str], object]) -> dict[str, dict[str, Any]]:
    tables = read_tables(path)
    for section in sorted(tables.keys() - SAVED.keys()):
        raise UserError(
            f"{path} sets [{section}], and settings beside a model are [rollout] and [erasure] alone. Remove that section; to "
            "use its settings, pass them on the command line or in a recipe of your own"
        )
    try:
        tables = {section: current_names(table, section) for section, table in tables.items()}
        rollout = build_section(RolloutConfig, tables.get("rollout", {}), "rollout")
        erasure = build_section(ErasureConfig, tables.get("erasure", {}), "erasure")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    named = Config(rollout=RolloutConfig(engine=rollout.engine), erasure=erasure)
    code = foreign_code(named)
    require_named(code, named, own, path)
    taken: dict[str, dict[str, Any]] = {}
    for section, values, usual in (("rollout", rollout, RolloutConfig()), ("erasure", erasure, ErasureConfig())):
        keys = [key for key in tables.get(section, {}) if f"{section}.{key}" not in code]
        taken[section] = {key: getattr(values, key) for key in keys if key in SAVED[section]}
        for key in (k for k in keys if k not in SAVED[section] and getattr(values, k) != getattr(usual, k)):
            say(
                f"{path}: {section}.{key} = {getattr(values, key)} is not taken from a model's directory; pass it yourself"
            )
    return taken


def save_companions(directory: Path, config: Config, calibration: CalibrationStatistics) -> None:
    """Write the settings of decoding, and the statistics where there are any, into a model's directory."""
    if calibration.segments:
        calibration.save(directory)
    tables = to_tables(config)
    saved = {section: {name: tables[section][name] for name in names} for section, names in SAVED.items()}
    write_text(directory / RECIPE_NAME, tables_to_toml(saved))


def find_companions(model: str) -> Companions:
    """What is saved beside a local model; nothing for a hub id."""
    directory = Path(model)
    recipe = directory / RECIPE_NAME
    known = (directory / FILE_NAME).is_file()
    return Companions(recipe if recipe.is_file() else None, CalibrationStatistics.load(directory) if known else None)
