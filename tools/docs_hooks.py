"""Lets mkdocs build pages that also read well in the repository: links, formulas, and the list of pages of results."""

from __future__ import annotations

import html
import logging
import re
from pathlib import Path
from typing import Any

FORMULA = re.compile(r"\$<code>(.+?)</code>\$", re.S)
"""What $`…`$ has become in a page's HTML; GitHub shows it as mathematics itself."""
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Every page of docs/results stands in the navigation, under its own title."""
    pages = sorted(p.name for p in (Path(config["docs_dir"]) / "results").glob("*.md"))
    config["nav"].append({"Results": [f"results/{name}" for name in pages]})
    return config


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The page, with plain text where a relative link would lead out of the site."""
    if "$`" in markdown:
        page.meta["hide"] = ["toc"]  # formulas need the room
    docs = Path(config["docs_dir"]).resolve()
    here = Path(page.file.abs_src_path).resolve().parent

    def inside_or_text(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target or (here / target).resolve().is_relative_to(docs):
            return match[0]
        return match[1]

    return LINK.sub(inside_or_text, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""
    return FORMULA.sub(lambda match: mathml(html.unescape(match[1])), content)


def mathml(latex: str) -> str:
    """A formula for the page; its LaTeX where the package that translates it is missing."""
    try:
        from latex2mathml.converter import convert
    except ImportError:
        logging.getLogger("mkdocs.hooks").info("latex2mathml is not installed (make docs does): formulas stay LaTeX")
        return f"<code>{html.escape(latex)}</code>"
    return str(convert(latex))
