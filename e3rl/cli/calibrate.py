"""`e3rl calibrate`: which erasure settings suit a model, and the calibration statistics that go with them."""

from __future__ import annotations

import argparse
from pathlib import Path

from e3rl.cli.main import add_setting_arguments
from e3rl.cli.opening import open_model
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
    opened = open_model(options)

    from rich.console import Console

    from e3rl.data.loading import load_problems
    from e3rl.rollout.calibrate import calibrate, calibration_directory, calibration_table, compared_settings
    from e3rl.rollout.companions import save_companions

    directory = calibration_directory(options.model, options.output)
    compared_settings(opened.config, KAPPAS)  # what can be wrong is found before the model is loaded
    load_problems(options.data, config=opened.config.data, split="train")
    policy = opened.load_policy()
    result = calibrate(
        policy, options.data, opened.config, prompts=options.prompts, target=options.target, kappa0s=KAPPAS
    )
    console = Console()
    console.print(calibration_table(result))
    save_companions(directory, result.config, result.calibration)
    console.print(f"Saved calibration statistics and settings in {directory}", soft_wrap=True, highlight=False)
    return 0
