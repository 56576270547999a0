"""First steps that commands share: resolve settings, announce code that is not e3rl's, open the model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from e3rl.cli.recipes import find_recipe, find_recipes
from e3rl.config import Config, layered, load_config
from e3rl.model_files import require_model, resolve_model_path
from e3rl.plugins import foreign_code, foreign_code_lines, require_named

if TYPE_CHECKING:
    from e3rl.models import Policy
    from e3rl.rollout.statistics import CalibrationStatistics


@dataclass(frozen=True)
class Opening:
    """A model's resolved settings and calibration statistics. ``own_settings``: from a recipe, or saved with the model."""

    config: Config
    calibration: CalibrationStatistics | None
    own_settings: bool

    def load_policy(self) -> Policy:
        """Load the model. This is slow: check everything else first."""
        from e3rl.models import load_policy

        return load_policy(self.config.model)


def open_model(options: argparse.Namespace) -> Opening:
    """The settings for a command's MODEL: its --recipe or else those saved beside the model, then overlays and overrides.

    Code that is not e3rl's is named on stderr before it runs.
    """
    require_model(options.model)
    from e3rl.rollout.companions import find_companions

    companions = find_companions(resolve_model_path(options.model))
    if getattr(options, "recipe", None):
        config = read_recipe(options)
    else:
        config = companions.config(find_recipes(options.overlay), options.overrides, say=_say)
    config = replace(config, model=replace(config.model, path=options.model))
    announce_foreign_code(config)
    quiet_libraries()
    return Opening(config, companions.calibration, bool(getattr(options, "recipe", None) or companions.recipe))


def read_recipe(options: argparse.Namespace, overrides: Sequence[str] = ()) -> Config:
    """The settings of a command's RECIPE. ``overrides`` come before those that the user wrote.

    The config of a run directory may come from elsewhere: UserError if it names code that the user has not named.
    """
    recipe, overlays, own = find_recipe(options.recipe), find_recipes(options.overlay), [*overrides, *options.overrides]
    config = load_config(recipe, overlays, own)
    if is_run_config(recipe):
        require_named(foreign_code(config), config, layered({}, overlays, own), recipe)
    require_model(config.model.path)
    return config


def is_run_config(path: Path) -> bool:
    """Whether it is the resolved config of a run directory, not a recipe that somebody wrote."""
    return path.name == "config.toml" and any(
        (path.parent / name).exists() for name in ("checkpoints", "metrics.jsonl", "rollouts", "summary.json")
    )


def announce_foreign_code(config: Config) -> None:
    """Name code that is not e3rl's on stderr before any of it runs."""
    lines = foreign_code_lines(foreign_code(config))
    if lines:
        print("This config runs code that is not e3rl's:", *(f"  {line}" for line in lines), sep="\n", file=sys.stderr)


def _say(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def quiet_libraries() -> None:
    """Only errors of transformers, datasets and the hub are shown."""
    import warnings

    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # users can't act on deprecations inside libraries
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
