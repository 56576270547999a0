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
