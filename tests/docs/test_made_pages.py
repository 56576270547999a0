"""Pages that tools write are those of the code as it is."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT


def test_the_reference_is_fresh():
    assert runpy.run_path(str(ROOT / "tools" / "reference_pages.py"))["main"](["--check"]) == 0


def test_a_stale_reference_is_noticed(tmp_path, capsys: pytest.CaptureFixture[str]):
    tool = runpy.run_path(str(ROOT / "tools" / "reference_pages.py"))
    tool["main"].__globals__["REFERENCE"] = tmp_path
    (tmp_path / "config.md").write_text(tool["config_page"]().replace("`kappa0`", "`kappa_0`"))
    (tmp_path / "cli.md").write_text(tool["cli_page"]())
    assert tool["main"](["--check"]) == 1
    assert "stale (config.md)" in capsys.readouterr().err


@pytest.fixture
def trace_row(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return runpy.run_path(str(ROOT / "tools" / "trace_row.py"))


def test_the_traced_row_is_fresh(trace_row: dict[str, Any]):
    assert trace_row["main"](["--check"]) == 0


def test_traces_are_the_same_up_to_the_last_digit(trace_row: dict[str, Any]):
    same = trace_row["same"]
    assert same("U 0.257 > 0.132", "U 0.258 > 0.131")
    assert not same("U 0.257 > 0.132", "U 0.267 > 0.132")
    assert not same("U 0.257: erased", "U 0.257: committed")


def test_the_figures_of_the_concepts_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    drawn = runpy.run_path(str(ROOT / "tools" / "concept_figures.py"))["main"](tmp_path)
    assert [p.name for p in drawn] == sorted(p.name for p in (ROOT / "docs" / "img").glob("concepts-*.svg"))
    erasure = drawn[0].read_text(encoding="utf-8")
    example = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    erased = re.search(r"^drawn +(\S+) .*: erased$", example, re.M)
    assert erased
    assert f"erased: {erased[1]}" in erasure


def test_pages_quote_the_code_as_it_is():
    assert runpy.run_path(str(ROOT / "tools" / "quotes.py"))["main"](["--check"]) == 0


def test_a_stale_quotation_is_noticed(tmp_path: Path):
    (tmp_path / "code.py").write_text("def g():\n    pass\n\n\ndef f(x):\n    return x\n\n\nZ = 1\n")
    written = runpy.run_path(str(ROOT / "tools" / "quotes.py"))["written"]
    page = "a\n<!-- quoted: code.py f -->\n\n```python\ndef f(y):\n    return y\n```\nb\n"
    fresh = page.replace("y", "x").replace("pxthon", "python").replace(".px", ".py")
    assert written(tmp_path, page) == fresh == written(tmp_path, fresh)
    with pytest.raises(SystemExit, match="has no function h"):
        written(tmp_path, page.replace("code.py f", "code.py h"))


def test_the_house_is_counted(tmp_path: Path):
    room = tmp_path / "e3rl" / "room"
    room.mkdir(parents=True)
    (tmp_path / "e3rl" / "__init__.py").write_text("")
    (room / "__init__.py").write_text("")
    long = "def f():\n" + "    x = 1\n" * 50
    (room / "a.py").write_text("class A: ...\n" + long)
    (room / "b.py").write_text("from e3rl.room.a import A\nfrom e3rl.room import c\n")
    (room / "c.py").write_text("import e3rl.room.a\n\n\nclass A: ...\n")
    counts = runpy.run_path(str(ROOT / "tools" / "house.py"))["read"](tmp_path)
    assert counts == {
        "files": 5,
        "lines": 58,
        "median file": 2,
        "longest file": 52,
        "functions over 50 lines": 1,
        "files in the largest room": 4,
        "modules with one importer": 1,
        "of these below 60 lines": 1,
        "class names with several meanings": 1,
    }
