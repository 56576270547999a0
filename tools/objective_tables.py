"""Writes the tables of docs/objectives.md from the code: every objective's options, and how long each one is.

python tools/objective_tables.py            rewrite what stands between <!-- NAME --> and <!-- end -->
python tools/objective_tables.py --check    exit 1 if the page is stale
"""

from __future__ import annotations

import re
import sys
from dataclasses import Field
from pathlib import Path
from typing import Any

from e3rl.objectives import OBJECTIVES, options

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "objectives.md"
BLOCK = re.compile(r"<!-- (options \w+|lines) -->\n.*?<!-- end -->", re.DOTALL)


def range_of(field: Field[Any]) -> str:
    """The bounds of an option or its choices, as a reader would write them."""
    if field.type.startswith("Literal["):
        return field.type.removeprefix("Literal[").removesuffix("]").replace("'", "`")
    low, above, high = (field.metadata[key] for key in ("min", "above", "max"))
    parts = [f"≥ {low:g}" if low is not None else "", f"> {above:g}" if above is not None else ""]
    return ", ".join(p for p in [*parts, f"≤ {high:g}" if high is not None else ""] if p)


def option_table(name: str) -> str:
    """Name, default, range or choices, meaning and source of every option."""
    fields = options(name)
    if not fields:
        return "No options."
    rows = [
        f"| `{f.name}` | `{f.default}` | {range_of(f)} | {f.metadata['help']} | {f.metadata['source']} |"
        for f in fields
    ]
    return "\n".join(["| option | default | range | meaning | source |", "|---|---|---|---|---|", *rows])


def line_table() -> str:
    """Lines of every objective's file."""
    files = {name: target.partition(":")[0].replace(".", "/") + ".py" for name, target in OBJECTIVES.items()}
    rows = [
        f"| [`{name}`](../{path}) | {len((ROOT / path).read_text(encoding='utf-8').splitlines())} |"
        for name, path in files.items()
    ]
    return "\n".join(["| objective | lines |", "|---|---|", *rows])


def rewritten(page: str) -> str:
    """The page with its tables as the code has them."""

    def table(match: re.Match[str]) -> str:
        kind, _, name = match[1].partition(" ")
        body = option_table(name) if kind == "options" else line_table()
        return f"<!-- {match[1]} -->\n{body}\n<!-- end -->"

    return BLOCK.sub(table, page)


def main(arguments: list[str]) -> int:
    """0, or 1 where --check finds the page stale."""
    page = PAGE.read_text(encoding="utf-8")
    fresh = rewritten(page)
    if "--check" in arguments:
        if page != fresh:
            print("docs/objectives.md is stale: run python tools/objective_tables.py", file=sys.stderr)
        return int(page != fresh)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
