"""Puts functions of the code into pages that quote them; ``--check`` says which page is stale.

A page says `<!-- quoted: FILE FUNCTION -->` on the line before a fenced block; the block is written from the code.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "CONTRIBUTING.md",)
QUOTE = re.compile(r"(<!-- quoted: (?P<file>\S+) (?P<name>\w+) -->\n\n```python\n).*?(?=^```$)", re.M | re.S)


def source(root: Path, file: str, name: str) -> str:
    """A function of a file as it stands there, docstring and comments included."""
    text = (root / file).read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return "".join(text.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno])
    raise SystemExit(f"{file} has no function {name}: correct the page that quotes it")


def written(root: Path, page: str) -> str:
    """The page with its quotations as they are in the code now."""
    return QUOTE.sub(lambda match: match[1] + source(root, match["file"], match["name"]), page)


def main(arguments: list[str]) -> int:
    """Write the pages, or with ``--check`` name those that are stale."""
    stale = [
        page for page in PAGES if written(ROOT, page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")
    ]
    if "--check" not in arguments:
        for page in stale:
            page.write_text(written(ROOT, page.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    for page in stale:
        print(f"{page.relative_to(ROOT)} is stale: run python tools/quotes.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
