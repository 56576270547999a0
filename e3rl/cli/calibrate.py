"""`e3rl calibrate`: which erasure settings suit a model, and the reference statistics that go with them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from e3rl.cli.foreign import announce_foreign_code
from e3rl.cli.main import add_setting_arguments
from e3rl.cli.recipes import find_recipe, find_recipes
from e3rl.config import load_config
from e3rl.errors import UserError

KAPPAS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a directory, a hub id, 'lab' or 'smollm2'")
    parser.add_argument("data", help="problems like those it will be used on: a file, a hub id or lab:FAMILY[:LEVEL]")
    parser.add_argument("--prompts", type=int, default=32, metavar="N", help="problems to sample (default 32)")
    parser.add_argument(
        "--target", type=float, default=0.1, metavar="SHARE", help="share of segments to erase (default 0.1)"
    )
    parser.add_argument("--recipe", help="take the other settings from this recipe; default: those beside the model")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to save; default: beside the model")
    add_setting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    if not 0 < options.target < 1 or options.prompts < 1:
        raise UserError("--target must lie between 0 and 1, --prompts must be at least 1")
    from rich.console import Console

    from e3rl.calibrate import calibrate, calibration_directory, calibration_table
    from e3rl.cli.quiet import quiet_libraries
    from e3rl.models import load_policy, resolve_model_path
    from e3rl.rollout.companions import find_companions, save_companions

    quiet_libraries()
    directory = calibration_directory(options.model, options.output)
    own = find_companions(resolve_model_path(options.model)).recipe
    recipe = find_recipe(options.recipe) if options.recipe else own
    config = load_config(recipe, find_recipes(options.overlay), options.overrides)
    announce_foreign_code(config)
    policy = load_policy(replace(config.model, path=options.model))
    result = calibrate(policy, options.data, config, prompts=options.prompts, target=options.target, kappa0s=KAPPAS)
    console = Console()
    console.print(calibration_table(result))
    save_companions(directory, result.config, result.reference)
    console.print(f"Saved reference statistics and settings in {directory}", soft_wrap=True, highlight=False)
    return 0
