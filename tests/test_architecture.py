"""The shape of the house: imports go one way, pages made from code are fresh, files stay small enough to read."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "e3rl"

FLOORS = [
    {"types", "config", "sections", "errors", "parsing", "plugins", "files", "__init__"},
    {"equations"},
    {"engine", "environments", "objectives", "rewards", "data", "lab", "models", "model_files", "web"},
    {"rollout"},
    {"train", "cluster", "evaluate", "testing"},
    {"report", "generation", "doctor", "diagnose", "plan", "serve", "integrations", "rehearse"},
    {"cli", "__main__"},
]
"""A module may import from its own floor and from those above it in this list."""

LINES = {"equations": 150, "objectives": 150, "config.py": 450}
LONGEST = 320


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def _floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def _imports(tree: ast.AST) -> set[str]:
    """Modules of the package that are imported anywhere in a file, but for type checking alone."""
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {m for m in found if m == "e3rl" or m.startswith("e3rl.")}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path):
    here = _room("e3rl." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    if here == "__init__":  # the package's front door names its public things, and imports them when they are used
        return
    for module in _imports(ast.parse(path.read_text(encoding="utf-8"))):
        assert _floor(_room(module)) <= _floor(here), f"{path.name} ({here}) imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_can_be_read_in_one_sitting(path: Path):
    room = path.relative_to(PACKAGE).parts[0]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES.get(room, LONGEST)


@pytest.mark.parametrize("tool", ["equation_map.py", "run_directory_page.py", "objective_tables.py"])
def test_pages_made_from_code_are_fresh(tool: str):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
