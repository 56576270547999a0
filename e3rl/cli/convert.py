"""`e3rl convert`: another library's training settings as a recipe, and a list of what does not carry over."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from e3rl.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("library", choices=["trl"], help="where the settings come from")
    parser.add_argument(
        "source",
        nargs="+",
        help="a YAML or JSON file, a Python script with GRPOTrainer(...) or RLOOTrainer(...), or "
        "'-- trl rloo --learning_rate 1e-6 ...'; arguments after a file override it",
    )
    parser.add_argument("--model", help="the model, where the settings name none that can be read")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the recipe there; default: standard output")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="processes that the training ran on; default: 1"
    )


def run(options: argparse.Namespace) -> int:
    from e3rl.files import write_text
    from e3rl.integrations.trl_arguments import Arguments, read_arguments
    from e3rl.integrations.trl_recipe import translate

    if options.processes < 1:
        raise UserError("--processes must be at least 1")
    arguments = read_arguments(options.source)
    if options.model:
        arguments = arguments.updated(Arguments({"model_name_or_path": options.model}))
    rows_file = options.output.with_name(f"{options.output.stem}_rows.py") if options.output else None
    translation = translate(arguments, processes=options.processes, rows_file=rows_file)
    text = translation.to_toml()
    if options.output:
        if rows_file and translation.rows:
            write_text(rows_file, translation.rows)
            print(
                f"rows:   {rows_file}, the script's code for its dataset; it runs when the recipe does", file=sys.stderr
            )
        write_text(options.output, text)
        print(f"recipe: {options.output}", file=sys.stderr)
    else:
        print(text, end="")
    for loss in translation.losses:
        print(f"not carried over: {loss}", file=sys.stderr)
    return 0
