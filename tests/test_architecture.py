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
    {
        "types",
        "config",
        "settings",
        "training_settings",
        "sections",
        "errors",
        "parsing",
        "synonyms",
        "plugins",
        "files",
        "__init__",
    },
    {"equations"},
    {
        "engine",
        "environments",
        "objectives",
        "rewards",
        "data",
        "lab",
        "models",
        "model_files",
        "offload",
        "quantization",
        "weights",
        "reward_model",
        "web",
    },
    {"rollout"},
    {"train", "cluster", "evaluate", "testing"},
    {"report", "generation", "doctor", "diagnose", "plan", "serve", "integrations", "rehearse"},
    {"cli", "__main__"},
]
"""A module may import from its own floor and from those above it in this list."""

LINES = {"equations": 150, "objectives": 150, "settings.py": 400, "types.py": 370}
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


def test_functions_fit_on_a_screen():
    functions = (
        (f"{path.relative_to(ROOT)}:{node.name}", (node.end_lineno or 0) - node.lineno + 1)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert {name: lines for name, lines in functions if lines > 50} == {}


@pytest.mark.parametrize("tool", ["equation_map.py", "run_directory_page.py", "objective_tables.py"])
def test_pages_made_from_code_are_fresh(tool: str):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


PACKAGES = ("e3rl", "e3rl_reproduce")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
LARGEST_ROOM = 22
SMALL = 60
"""Lines below which a file with one importer belongs to that one."""

SEAMS = {
    "e3rl.cli": "a command is one file, imported only where it is chosen",
    "e3rl.equations": "the papers' formulas stand together, a file a section",
    "e3rl.evaluate.workers": "starts processes that evaluate a part each",
    "e3rl.objectives": "an objective is one file, chosen by name",
    "e3rl.lab": "a family of problems is one file, chosen by name",
}
"""Rooms, and modules, whose small files with one importer stay, and why."""


def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def _uses(tree: ast.Module, *, at_import: bool = False) -> set[str]:
    """Modules of ours that a file names in imports and in plug-in tables; ``at_import``: those it needs to be imported."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if at_import
        and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            or (isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING")
        )
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not at_import:
            found.add(node.value.partition(":")[0])
    return found & MODULES.keys()


def test_a_class_name_means_one_thing():
    places: dict[str, list[str]] = {}
    for module in MODULES:
        for node in ast.walk(_tree(module)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_no_module_needs_itself_to_be_imported():
    waiting = {module: _uses(_tree(module), at_import=True) - {module} for module in MODULES}
    while ready := {module for module, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {module: needs for module, needs in waiting.items() if module not in ready}
    assert waiting == {}, "these import each other, or what does"


def test_rooms_are_not_too_large_to_know():
    rooms: dict[str, int] = {}
    for module, path in MODULES.items():
        parts = path.relative_to(ROOT).parts
        room = "/".join(parts[: min(2, len(parts) - 1)])
        rooms[room] = rooms.get(room, 0) + (module.count(".") > 0)
    assert {room: files for room, files in rooms.items() if files > LARGEST_ROOM} == {}


def test_a_small_file_has_several_readers_or_a_reason():
    importers: dict[str, set[str]] = {module: set() for module in MODULES}
    for module in MODULES:
        for used in _uses(_tree(module)) - {module}:
            importers[used].add(module)
    small = {
        module: sorted(importers[module])
        for module, path in MODULES.items()
        if path.name not in ("__init__.py", "__main__.py")
        and len(path.read_text(encoding="utf-8").splitlines()) < SMALL
        and len(importers[module]) == 1
        and not {module, module.rpartition(".")[0]} & SEAMS.keys()
    }
    assert small == {}, "merge each into its importer, or give SEAMS its reason"


def test_every_reason_for_a_small_file_is_still_needed():
    assert SEAMS.keys() <= MODULES.keys()
