"""`e3rl diagnose` measures whether erasing can help a model, `e3rl calibrate` chooses its erasure settings."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from e3rl.cli.main import add_setting_arguments
from e3rl.cli.opening import open_model
from e3rl.errors import UserError, unknown

SETTINGS = "paper-1, paper-2, paper+eps, eps-0.5, eps-1, whole-mild, whole, whole+eps, whole+eps+length, half+eps"


def diagnose_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a directory, a hub id, 'lab' or 'smollm2'")
    parser.add_argument("data", help="problems like those it will be used on: a file, a hub id or lab:FAMILY[:LEVEL]")
    parser.add_argument("--problems", type=int, default=48, metavar="N", help="problems to look at (default 48)")
    parser.add_argument("--retries", type=int, default=4, metavar="N", help="retries from each prefix (default 4)")
    parser.add_argument(
        "--temperatures", type=float, nargs="+", metavar="T", help="for plain decoding (default 1, 0.6 and 0.3)"
    )
    parser.add_argument(
        "--settings", nargs="+", metavar="NAME", help=f"erasure settings to try, of: {SETTINGS} (default all)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("diagnosis"), metavar="DIR", help="directory for page and JSON"
    )
    parser.add_argument(
        "--recipe", help="take the other settings from this recipe; default: those saved beside the model"
    )
    add_setting_arguments(parser)


def diagnose(options: argparse.Namespace) -> int:
    """`e3rl diagnose`: can erasing help this model on these problems? Measured, with a page, before anything is trained."""
    if options.problems < 4 or options.retries < 1:
        raise UserError("--problems must be at least 4, --retries at least 1")
    from rich.console import Console

    from e3rl.cli.live import LiveCount
    from e3rl.data.loading import load_problems
    from e3rl.diagnose import decoding
    from e3rl.diagnose.advice import advise
    from e3rl.diagnose.diagnosis import diagnose
    from e3rl.diagnose.page import decoding_table, signal_table, write_diagnosis
    from e3rl.lab.reward import graded_by_the_lab

    temperatures = options.temperatures or decoding.TEMPERATURES
    settings = tuple(decoding.SETTINGS) if options.settings is None else tuple(options.settings)
    for name in settings:
        if name not in decoding.SETTINGS:
            raise unknown("erasure setting", name, decoding.SETTINGS)
    if not all(0 < t < float("inf") for t in temperatures):
        raise UserError("--temperatures must be above 0")
    opened = open_model(options)
    config = graded_by_the_lab(opened.config, options.data)
    config = replace(config, eval=replace(config.eval, num_samples=config.rollout.num_generations))
    if config.rollout.num_generations < max(2, config.erasure.min_siblings):
        raise UserError("a diagnosis compares samples of a problem: rollout.num_generations must be at least 2")
    load_problems(options.data, config=config.data, split="train")  # reports bad data before the model loads
    console, policy = Console(), opened.load_policy()
    with LiveCount("diagnosing") as live:
        result = diagnose(
            policy,
            options.data,
            config,
            problems=options.problems,
            retries=options.retries,
            temperatures=temperatures,
            settings=settings,
            own_settings=opened.own_settings,
            report=lambda text: console.print(f"{text} …", highlight=False),
            tell=live.tell,
        )
    console.print(signal_table(result))
    console.print(decoding_table(result))
    for finding in advise(result):
        console.print(f"• {finding.text}", highlight=False)
    console.print(f"page: {write_diagnosis(options.output, result)}", soft_wrap=True, highlight=False)
    return 0


KAPPAS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)


def calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a directory, a hub id, 'lab' or 'smollm2'")
    parser.add_argument("data", help="problems like those it will be used on: a file, a hub id or lab:FAMILY[:LEVEL]")
    parser.add_argument("--prompts", type=int, default=32, metavar="N", help="problems to sample (default 32)")
    parser.add_argument(
        "--target", type=float, default=0.1, metavar="SHARE", help="share of segments to erase (default 0.1)"
    )
    parser.add_argument("--recipe", help="take the other settings from this recipe; default: those beside the model")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to save; default: beside the model")
    add_setting_arguments(parser)


def calibrate(options: argparse.Namespace) -> int:
    """`e3rl calibrate`: which erasure settings suit a model, and the calibration statistics that go with them."""
    if not 0 < options.target < 1 or options.prompts < 1:
        raise UserError("--target must lie between 0 and 1, --prompts must be at least 1")
    opened = open_model(options)

    from rich.console import Console

    from e3rl.cli.live import LiveCount
    from e3rl.data.loading import load_problems
    from e3rl.rollout.calibrate import calibrate, calibration_directory, calibration_table, compared_settings
    from e3rl.rollout.companions import save_companions

    directory = calibration_directory(options.model, options.output)
    compared_settings(opened.config, KAPPAS)  # reports bad settings before the model loads
    load_problems(options.data, config=opened.config.data, split="train")
    policy = opened.load_policy()
    asked = {"prompts": options.prompts, "target": options.target}
    with LiveCount("calibrating") as live:
        result = calibrate(policy, options.data, opened.config, **asked, kappa0s=KAPPAS, tell=live.tell)
    console = Console()
    console.print(calibration_table(result))
    save_companions(directory, result.config, result.calibration)
    console.print(f"Saved calibration statistics and settings in {directory}", soft_wrap=True, highlight=False)
    return 0
