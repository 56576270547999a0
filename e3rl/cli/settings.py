"""`e3rl settings`: every setting with its default, range, meaning and source."""

from __future__ import annotations

import argparse
import dataclasses
import typing

from e3rl.config import Config
from e3rl.errors import unknown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("section", nargs="?", help="show one section only")


def run(options: argparse.Namespace) -> int:
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
