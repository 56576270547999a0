"""Writes docs/reference/config.md and docs/reference/cli.md from the code. With --check: fails where a page is stale."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from e3rl.cli.main import _COMMANDS, _parser
from e3rl.config import Config

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "reference"
MADE = "Written by `python tools/reference_pages.py`; do not edit."


def escaped(text: str) -> str:
    """Text that stays inside its table cell."""
    return text.replace("|", "\\|")


def shown(value: Any) -> str:
    """A default as it would stand in a recipe."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{v}"' if isinstance(v, str) else str(v) for v in value) + "]`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def range_of(kind: Any, limits: Mapping[str, Any]) -> str:
    """The choices or bounds of a setting."""
    if typing.get_origin(kind) is Literal:
        return ", ".join(f'`"{choice}"`' for choice in typing.get_args(kind))
    signs = {"min": "≥", "above": ">", "max": "≤"}
    found = [f"{sign} {limits[key]:g}" for key, sign in signs.items() if limits.get(key) is not None]
    return ", ".join(found) or {int: "whole number", float: "number", bool: "true, false"}.get(kind, "text")


def first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").splitlines()[0]


def section_lines(name: str, kind: type) -> Iterable[str]:
    """One section of a recipe as a table."""
    hints = typing.get_type_hints(kind)
    yield from (f"## [{name}]", "", first_line(kind), "")
    yield from ("| setting | default | range | meaning | default from |", "| --- | --- | --- | --- | --- |")
    for field in dataclasses.fields(kind):
        meta = field.metadata
        if field.default is dataclasses.MISSING:
            yield f"| *options* | | | {escaped(meta['help'])}: see [objectives](../objectives.md) | |"
            continue
        source = "" if meta["source"] == "ours" else meta["source"]
        cells = (shown(field.default), range_of(hints[field.name], meta), escaped(meta["help"]), source)
        yield f"| `{field.name}` | {' | '.join(cells)} |"
    yield ""


def config_page() -> str:
    """Every section and setting of a recipe."""
    head = [
        "# Settings",
        "",
        MADE,
        "",
        "A recipe is a TOML file with these sections. On the command line any of them is `section.setting=value`. Where the",
        "last column is empty the default is ours: the paper gives no value.",
        "",
    ]
    sections = typing.get_type_hints(Config)
    return "\n".join([*head, *(line for name, kind in sections.items() for line in section_lines(name, kind))])


def argument_rows(parser: argparse.ArgumentParser) -> Iterable[str]:
    """The arguments of a command, positional ones first."""
    for action in sorted(parser._actions, key=lambda a: bool(a.option_strings)):
        if isinstance(action, argparse._HelpAction):
            continue
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        if action.option_strings and action.nargs != 0:
            name += f" {action.metavar or action.dest.upper()}"
        default = action.default not in (None, False, [], "==SUPPRESS==") and "default" not in (action.help or "")
        suffix = f" (default {action.default})" if default else ""
        yield f"| `{escaped(name)}` | {escaped(action.help or '')}{suffix} |"


def cli_page() -> str:
    """Every command with its arguments."""
    lines = [
        "# Commands",
        "",
        MADE,
        "",
        "`e3rl COMMAND --help` says the same. Exit codes: 0; 2 for what you can put right, with one",
        "sentence that says how; 130 after a stop that was asked for (everything is saved).",
        "",
    ]
    for name, (_, meaning) in _COMMANDS.items():
        rows = list(argument_rows(command_parser(name)))
        table = ["| argument | meaning |", "| --- | --- |", *rows, ""]
        lines += [f"## e3rl {name}", "", f"{meaning[0].upper()}{meaning[1:]}.", "", *table]
    return "\n".join(lines)


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command, with its own arguments."""
    (commands,) = (a for a in _parser(name)._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[name]


PAGES = {"config.md": config_page, "cli.md": cli_page}


def main(arguments: list[str]) -> int:
    """0, or 1 where --check finds a stale page."""
    stale = []
    for name, page in PAGES.items():
        path, fresh = REFERENCE / name, page()
        if "--check" not in arguments:
            path.parent.mkdir(exist_ok=True)
            path.write_text(fresh, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != fresh:
            stale.append(name)
    if stale:
        print(f"docs/reference is stale ({', '.join(stale)}): run python tools/reference_pages.py", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
