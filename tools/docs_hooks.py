"""Lets mkdocs build pages that also read well in the repository: links to files outside docs/ become plain text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The page, with nothing that leads out of the site by a relative path."""
    docs = Path(config["docs_dir"]).resolve()
    here = Path(page.file.abs_src_path).resolve().parent

    def inside_or_text(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target or (here / target).resolve().is_relative_to(docs):
            return match[0]
        return match[1]

    return LINK.sub(inside_or_text, markdown)
