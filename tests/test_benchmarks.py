"""Every benchmark starts: its imports stand, and a command's `--help` is understood."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
BENCHMARKS = sorted(FOLDER.glob("*.py"))

START = """
import runpy, sys
for path in sys.argv[1:]:
    name, sys.argv = path, [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
    except BaseException as error:
        raise SystemExit(f"{name}: {type(error).__name__}: {error}")
"""


def _optional(path: Path) -> str | None:
    """A package that the benchmark imports at its top and that an environment need not have."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    roots = {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
    roots |= {a.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for a in node.names}
    return next(iter(roots & {"trl", "httpx"}), None)


def _started(paths: list[Path]) -> None:
    """Start all of them in one process, which pays for the common imports once."""
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(FOLDER)!r}){START}", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]


def test_every_benchmark_starts():
    _started([path for path in BENCHMARKS if not _optional(path)])


@pytest.mark.parametrize("path", [p for p in BENCHMARKS if _optional(p)], ids=lambda p: p.name)
def test_benchmarks_beside_a_peer_start_where_it_is_installed(path: Path):
    pytest.importorskip(_optional(path) or "")
    _started([path])


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda p: p.name)
def test_a_benchmark_is_a_command_or_imported_by_one(path: Path):
    text = path.read_text(encoding="utf-8")
    imported = any(f"from {path.stem} import" in other.read_text(encoding="utf-8") for other in BENCHMARKS)
    assert 'if __name__ == "__main__":' in text or imported, "neither a command nor a part of one"


def test_what_a_benchmarks_model_needs_is_found_out_before_anything_is_measured(tmp_path: Path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "rollout.py"), "--json", str(tmp_path / "out.json"), "--only", "linear_memory", "profile"],
        env={**os.environ, "E3RL_HOME": str(tmp_path / "file" / "home")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "SmolLM2" in done.stderr.splitlines()[-1]
    assert done.stdout == ""
    assert not (tmp_path / "out.json").exists()
