"""The research package: carried whole, without circles, found by the names that users know, missed with a sentence."""

from __future__ import annotations

import ast
import importlib.util
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

import e3rl_reproduce
from e3rl.cli import main
from e3rl.cli.recipes import find_recipe, recipe_names
from e3rl.config import load_config
from e3rl.errors import UserError
from tests.test_package import PROJECT

PACKAGE = Path(e3rl_reproduce.__file__).parent
FILES = {path.stem: path for path in PACKAGE.glob("*.py")}


def test_no_file_is_left_behind():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["e3rl_reproduce"]
    carried = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    there = {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert there == carried


def test_modules_import_each_other_in_one_direction():
    graph = {}
    for name, path in FILES.items():
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        used = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        graph[name] = {
            module.removeprefix("e3rl_reproduce.") for module in used if module.startswith("e3rl_reproduce.")
        }
    assert set(TopologicalSorter(graph).static_order()) == set(FILES)


def test_files_can_be_read_in_one_sitting():
    assert max(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES.values()) <= 320
    assert len(FILES) <= 22  # as a room of e3rl


def test_ablations_are_found_by_their_names():
    assert load_config(None, [find_recipe("ablations/without-base")]).erasure.base_weight == 0
    assert len([name for name in recipe_names() if name.startswith("ablations/")]) == 12


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes packages look as if they were not installed."""
    find = importlib.util.find_spec

    def hide(*names: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in names else find(name, *a))

    return hide


def test_without_the_research_package_its_names_say_what_to_install(without: Any):
    without("e3rl_reproduce")
    with pytest.raises(UserError, match=r"ablations/without-base comes with .*: pip install 'e3rl\[reproduce\]'"):
        find_recipe("ablations/without-base")
    assert "methods/e3rl" in recipe_names()
    assert not [name for name in recipe_names() if name.startswith("ablations/")]


@pytest.mark.parametrize("missing", [("scipy",), ("e3rl_reproduce",), ("e3rl_reproduce", "scipy")])
def test_the_command_says_what_it_lacks(missing: tuple[str, ...], without: Any, capsys: pytest.CaptureFixture[str]):
    without(*missing)
    assert main(["reproduce", "table1"]) == 2
    assert capsys.readouterr().err == (
        f"e3rl: e3rl reproduce needs {' and '.join(missing)}: pip install 'e3rl[reproduce]'\n"
    )
