"""What is saved beside a model so that it can be decoded with erasure: reference statistics, and the settings they fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from e3rl.config import Config, to_toml
from e3rl.files import write_text
from e3rl.rollout.statistics import FILE_NAME, ReferenceStatistics

RECIPE_NAME = "e3rl_recipe.toml"


@dataclass(frozen=True)
class Companions:
    """Either is None where the model has none."""

    recipe: Path | None
    reference: ReferenceStatistics | None


def save_companions(directory: Path, config: Config, reference: ReferenceStatistics) -> None:
    """Write the rollout and erasure settings, and the statistics where there are any, into a model's directory."""
    if reference.segments:
        reference.save(directory)
    write_text(directory / RECIPE_NAME, to_toml(config, sections=("rollout", "erasure")))


def find_companions(model: str) -> Companions:
    """What lies beside a model; nothing does where ``model`` is a hub id."""
    directory = Path(model)
    recipe = directory / RECIPE_NAME
    known = (directory / FILE_NAME).is_file()
    return Companions(recipe if recipe.is_file() else None, ReferenceStatistics.load(directory) if known else None)
