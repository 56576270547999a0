"""`e3rl objectives`: every objective with its options, their defaults, ranges, meanings and sources."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from e3rl.objectives import OBJECTIVES, options
from e3rl.plugins import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show one objective only; also module:name or file.py:name")


def option_range(option: dataclasses.Field[Any]) -> str:
    """The bounds of an option or its choices; empty where anything goes."""
    kind = str(option.type)
    if kind.startswith("Literal["):
        return ", one of " + kind.removeprefix("Literal[").removesuffix("]")
    low, above, high = (option.metadata.get(bound) for bound in ("min", "above", "max"))
    parts = [f"at least {low:g}" if low is not None else "", f"above {above:g}" if above is not None else ""]
    bounds = " and ".join(p for p in [*parts, f"at most {high:g}" if high is not None else ""] if p)
    return f", {bounds}" if bounds else ""


def run(arguments: argparse.Namespace) -> int:
    """Print the objectives; options stand in [objective] beside its name."""
    from e3rl.objectives.checks import check_class

    for name in [arguments.name] if arguments.name else OBJECTIVES:
        kind = load("objective", name, OBJECTIVES)
        check_class(name, kind)
        print(f"{name}  {(kind.__doc__ or '').strip().partition(chr(10))[0]}".rstrip())
        for option in options(name):
            meaning, source = option.metadata.get("help", ""), option.metadata.get("source", "")
            print(f"  {option.name} = {option.default!r}{option_range(option)}")
            print(f"      {meaning} [{source}]" if source else f"      {meaning}")
        print("" if options(name) else "  no options\n")
    return 0
