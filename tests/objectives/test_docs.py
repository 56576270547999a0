"""docs/objectives.md has a section for every objective, with tables that are those of the code."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from e3rl.objectives import OBJECTIVES, options

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
tool = runpy.run_path(str(ROOT / "tools" / "objective_tables.py"))


def test_tables_are_fresh() -> None:
    assert tool["main"](["--check"]) == 0


def test_a_changed_table_is_noticed() -> None:
    stale = PAGE.replace("| `kl_coef` | `0.04` |", "| `kl_coef` | `0.05` |")
    assert stale != PAGE
    assert tool["rewritten"](stale) == PAGE


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_and_option_is_documented(name: str) -> None:
    section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    for field in options(name):
        assert f"| `{field.name}` | `{field.default}` |" in section
