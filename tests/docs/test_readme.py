"""The README is short, and what it shows is what its commands print."""

from __future__ import annotations

import shlex

import pytest

from e3rl.cli import main
from tests.docs.pages import ROOT, Block, blocks

README = ROOT / "README.md"
LONGEST = 900


def _block(start: str) -> Block:
    (found,) = [b for b in blocks(README) if b.body.startswith(start)]
    return found


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= LONGEST


def test_decode_prints_what_the_readme_shows(capsys: pytest.CaptureFixture[str]):
    examples = _block("$ e3rl decode").body.strip().split("\n\n")
    assert len(examples) == 2
    for example in examples:
        command, _, shown = example.partition("\n")
        assert main(shlex.split(command.removeprefix("$ e3rl "))) == 0
        assert capsys.readouterr().out.strip() == shown.strip()


def test_the_python_example_prints_what_the_readme_says(capsys: pytest.CaptureFixture[str]):
    exec(compile(_block("from e3rl import generate").body, "README.md", "exec"), {"__name__": "snippet"})
    assert capsys.readouterr().out.split("\n") == ["8 of 8 right with erasing,", "2 without", ""]
    assert "This prints 8 and 2." in README.read_text(encoding="utf-8")
    quickstart = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    assert _block("from e3rl import generate").body.split("\n")[-2] in quickstart
