"""Wraps Markdown pages at one width; ``--check`` names the pages that have a wider line.

python tools/wrap.py [--check] [PAGE …]          by default README, CONTRIBUTING, … and all of docs/

A paragraph or list item without a line that is too wide stays as it is. Tables, headings, comments, pictures and fenced blocks
are left alone; code spans and links are never divided.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDEST, WRAPPED = 130, 126
MADE = re.compile(
    r"docs/(reference/|data-way|paper-scale|run-directory|equations|results/(table\d|fig\d|erpo-|settle|confirm))"
)
"""Pages that are made from code."""

APART = re.compile(r"\s*(\||#|```|<!--|!\[|<|>)")
ITEM = re.compile(r"(\s*)([-*+] |\d+\. )?")
WORD = re.compile(r"(?:`[^`]*`|\[[^\]]*\]\([^)]*\)|\S)+")


def pages() -> list[Path]:
    """All pages that people write."""
    found = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
    return [page for page in found if not MADE.search(str(page.relative_to(ROOT)))]


def filled(block: list[str]) -> list[str]:
    """A paragraph or list item, wrapped again if one of its lines is too wide."""
    if all(len(line) <= WIDEST for line in block):
        return block
    match = ITEM.match(block[0])
    assert match is not None
    indent, item = match[1], match[2] or ""
    words = WORD.findall(" ".join(line.strip() for line in block)[len(item) :])
    lines = [f"{indent}{item}{words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) > WRAPPED and not re.match(r"([-*+]|\d+\.|#+|\||>)$", word):
            lines.append(f"{indent}{' ' * len(item)}{word}")
        else:
            lines[-1] += f" {word}"
    return lines


def wrapped(text: str) -> str:
    """The page with its wide paragraphs wrapped again."""
    done: list[str] = []
    block: list[str] = []
    fenced = False
    for line in [*text.split("\n"), ""]:
        apart = fenced or not line.strip() or APART.match(line) is not None
        item = ITEM.match(line)
        if apart or (item and item[2]):
            done += filled(block) if block else []
            block = []
        if apart:
            done.append(line)
        else:
            block.append(line)
        fenced ^= line.lstrip().startswith("```")
    return "\n".join(done[:-1])


def main(arguments: list[str]) -> int:
    """Wrap the pages, or with ``--check`` name those that are too wide."""
    named = [Path(name) for name in arguments if name != "--check"] or pages()
    wide = [page for page in named if wrapped(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    for page in wide:
        if "--check" in arguments:
            print(f"{page} has lines of more than {WIDEST} characters: python tools/wrap.py {page}", file=sys.stderr)
        else:
            page.write_text(wrapped(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 1 if wide and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
