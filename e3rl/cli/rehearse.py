"""`e3rl rehearse`: a recipe from its command to its exported model, on the processes it would use, in minutes."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from e3rl.cli.main import add_setting_arguments
from e3rl.cli.opening import announce_foreign_code, quiet_libraries, read_recipe
from e3rl.cli.recipes import recipe_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help=f"a TOML file, or one of: {', '.join(recipe_names())}")
    parser.add_argument("--directory", metavar="DIR", help="keep everything there; default: a temporary directory")
    add_setting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    config = read_recipe(options)
    announce_foreign_code(config)

    from e3rl.rehearse.rehearsal import rehearse, report

    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="e3rl-rehearsal-") as temporary:
        directory = Path(options.directory or temporary).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        print(report(rehearse(config, directory, lambda text: print(text, flush=True))))
    return 0
