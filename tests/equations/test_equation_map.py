"""docs/equations.md is complete and fresh, and the tool that says so notices when it is not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("equation_map", ROOT / "tools" / "equation_map.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository in which one function and one test cover eq 1-35, with a fresh page."""
    for folder in ("e3rl", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "e3rl" / "all.py").write_text('def everything():\n    """Eq 1-35. All."""\n')
    (tmp_path / "tests" / "test_all.py").write_text('def test_everything():\n    """Eq 1-35. All."""\n')
    assert tool.main(["--root", str(tmp_path)]) == 0
    return tmp_path


def check(root: Path) -> int:
    return tool.main(["--check", "--root", str(root)])


def test_this_repository_is_complete_and_its_page_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    status = check(ROOT)
    assert status == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Eq 13. Segment uncertainty.", [("E3RL", 13)]),
        ("Eq 14-16. Moments.", [("E3RL", 14), ("E3RL", 15), ("E3RL", 16)]),
        ("Eq 9, 21-22.", [("E3RL", 9), ("E3RL", 21), ("E3RL", 22)]),
        ("ERPO eq 8. Gate.", [("ERPO", 8)]),
        ("The threshold of eq 17.", []),
        ("Eq 17 is cited without a full stop", []),
        ("", []),
    ],
)
def test_cited(docstring: str, expected: list[tuple[str, int]]) -> None:
    assert list(tool.cited(docstring)) == expected


def test_a_complete_repository_passes(repository: Path) -> None:
    assert check(repository) == 0


@pytest.mark.parametrize(("file", "kind"), [("e3rl/all.py", "function"), ("tests/test_all.py", "test")])
def test_a_gap_is_noticed(repository: Path, file: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / file).write_text((repository / file).read_text().replace("Eq 1-35.", "Eq 1-12, 14-35."))
    assert tool.main(["--root", str(repository)]) == 1
    assert check(repository) == 1  # a fresh page does not hide it
    assert f"E3RL eq 13 has no {kind}" in capsys.readouterr().err


def test_helpers_of_tests_are_no_tests(repository: Path) -> None:
    path = repository / "tests" / "test_all.py"
    path.write_text(path.read_text().replace("test_everything", "helper"))
    assert tool.main(["--root", str(repository)]) == 1


def test_a_stale_or_missing_page_is_noticed(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "e3rl" / "more.py").write_text('class Gate:\n    def weight(self):\n        """ERPO eq 8. Gate."""\n')
    assert check(repository) == 1
    assert "stale" in capsys.readouterr().err
    assert tool.main(["--root", str(repository)]) == 0
    assert check(repository) == 0
    page = repository / "docs" / "equations.md"
    assert "| 8 | entropy-aware gate | [Gate.weight](../e3rl/more.py) | – |" in page.read_text()
    page.unlink()
    assert check(repository) == 1


def test_an_equation_that_does_not_exist_is_noticed(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "e3rl" / "more.py").write_text('def f():\n    """Eq 36. Beyond the paper."""\n')
    assert tool.main(["--root", str(repository)]) == 1
    assert "e3rl/more.py: f names E3RL eq 36, which does not exist" in capsys.readouterr().err
