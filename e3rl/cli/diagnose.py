"""`e3rl diagnose`: can erasing help this model on these problems? Measured, with a page, before anything is trained."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from e3rl.cli.main import add_setting_arguments
from e3rl.cli.opening import open_model
from e3rl.errors import UserError, unknown

SETTINGS = "paper-1, paper-2, paper+eps, eps-0.5, eps-1, whole-mild, whole, whole+eps, whole+eps+length, half+eps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--output", type=Path, default=Path("diagnosis"), metavar="DIR", help="where page and JSON go")
    parser.add_argument(
        "--recipe", help="take the other settings from this recipe; default: those saved beside the model"
    )
    add_setting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    if options.problems < 4 or options.retries < 1:
        raise UserError("--problems must be at least 4, --retries at least 1")
    from rich.console import Console

    from e3rl.data.loading import load_problems
    from e3rl.diagnose import decoding
    from e3rl.diagnose.advice import advise
    from e3rl.diagnose.diagnosis import diagnose
    from e3rl.diagnose.page import write_diagnosis
    from e3rl.diagnose.tables import decoding_table, signal_table
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
    load_problems(
        options.data, config=config.data, split="train"
    )  # what is wrong with them is found before the model loads
    console = Console()
    result = diagnose(
        opened.load_policy(),
        options.data,
        config,
        problems=options.problems,
        retries=options.retries,
        temperatures=temperatures,
        settings=settings,
        own_settings=opened.own_settings,
        report=lambda text: console.print(f"{text} …", highlight=False),
    )
    console.print(signal_table(result))
    console.print(decoding_table(result))
    for finding in advise(result):
        console.print(f"• {finding.text}", highlight=False)
    console.print(f"page: {write_diagnosis(options.output, result)}", soft_wrap=True, highlight=False)
    return 0
