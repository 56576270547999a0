"""Markdown is wrapped at one width, so that a change to a page shows what was changed."""

from __future__ import annotations

import runpy

from tests.docs.pages import ROOT

WRAP = runpy.run_path(str(ROOT / "tools" / "wrap.py"))


def test_pages_are_wrapped():
    assert WRAP["main"](["--check"]) == 0


def test_only_paragraphs_with_a_wide_line_are_wrapped():
    word, short = "word " * 27, "a b\nc"
    code = "`" + "x " * 20 + "`"
    page = f"# {word}\n| {word} |\n```\n{word}\n```\n{short}\n\n- item {word}{code} -\n  end\n- {short}\n"
    item = f"- item {'word ' * 23}word\n  word word word {code} - end"
    assert WRAP["wrapped"](page) == page.replace(f"- item {word}{code} -\n  end", item)
    assert WRAP["wrapped"](WRAP["wrapped"](page)) == WRAP["wrapped"](page)
