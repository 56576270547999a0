"""`e3rl settings` and `e3rl objectives`: what can be set, as text."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

from e3rl.config import Config
from e3rl.errors import unknown
from e3rl.objectives import OBJECTIVES, options
from e3rl.plugins import load


def settings_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("section", nargs="?", help="show one section only")


def settings(options: argparse.Namespace) -> int:
    """`e3rl settings`: every setting with its default, range, meaning and source."""
    sections = typing.get_type_hints(Config)
    if options.section and options.section not in sections:
        raise unknown("section", options.section, sections)
    for section in [options.section] if options.section else sections:
        print(f"[{section}]  {(sections[section].__doc__ or '').splitlines()[0]}")
        for f in dataclasses.fields(sections[section]):
            source = f.metadata.get("source", "")
            default = "" if f.default is dataclasses.MISSING else f" = {f.default!r}"
            print(f"  {f.name}{default}\n      {f.metadata['help']}" + (f" [{source}]" if source else ""))
        print()
    return 0


def objectives_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show one objective only; also module:name or file.py:name")


def option_range(option: dataclasses.Field[Any]) -> str:
    """The bounds or choices of an option; empty if it has none."""
    kind = str(option.type)
    if kind.startswith("Literal["):
        return ", one of " + kind.removeprefix("Literal[").removesuffix("]")
    low, above, high = (option.metadata.get(bound) for bound in ("min", "above", "max"))
    parts = [f"at least {low:g}" if low is not None else "", f"above {above:g}" if above is not None else ""]
    bounds = " and ".join(p for p in [*parts, f"at most {high:g}" if high is not None else ""] if p)
    return f", {bounds}" if bounds else ""


def objectives(arguments: argparse.Namespace) -> int:
    """Print the objectives with their options, which are keys of [objective]."""
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
