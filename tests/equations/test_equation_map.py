"""docs/equations.md is complete and fresh, and the tool that says so notices when it is not."""

from __future__ import annotations

import importlib.util
import re
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


COMPUTED = [number for number in range(1, 36) if ("E3RL", number) not in tool.DEFINITIONS]
OF_ERPO = [number for number in range(1, 17) if ("ERPO", number) not in tool.DEFINITIONS]
ALL = f"Eq {', '.join(map(str, COMPUTED))}; ERPO eq {', '.join(map(str, OF_ERPO))}. All."
LOOP = "from e3rl.rollout.judge import decide\n"
JUDGE = "from e3rl.equations import everything\n\n\ndef decide():\n    return everything.all_of_it()\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository in which one function, which training calls, and one test cover all equations, with a fresh page."""
    files = {
        "e3rl/equations/everything.py": f'def all_of_it():\n    """{ALL}"""\n',
        "e3rl/rollout/judge.py": JUDGE,
        "e3rl/train/loop.py": LOOP,
        "tests/test_all.py": 'def test_everything():\n    """Eq 1-35; ERPO eq 1-16. All."""\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert tool.main(["--root", str(tmp_path)]) == 0
    return tmp_path


def check(root: Path) -> int:
    return tool.main(["--check", "--root", str(root)])


def test_this_repository_is_complete_and_its_page_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    status = check(ROOT)
    assert status == 0, capsys.readouterr().err


def test_every_equation_is_written_out() -> None:
    written = {(paper, int(number)): latex for paper, found in tool.FORMULAS.items() for number, latex in found.items()}
    assert written.keys() == tool.REQUIRED
    for equation, latex in written.items():
        assert "|" not in latex, equation  # it would end the table's cell
        assert latex.count("{") == latex.count("}"), equation
        assert len(re.findall(r"\\left\b", latex)) == len(re.findall(r"\\right\b", latex)), equation
    page = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    assert all(f"$`{latex}`$" in page for latex in written.values())


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Eq 13. Segment uncertainty.", [("E3RL", 13)]),
        ("Eq 14-16. Moments.", [("E3RL", 14), ("E3RL", 15), ("E3RL", 16)]),
        ("Eq 9, 21-22.", [("E3RL", 9), ("E3RL", 21), ("E3RL", 22)]),
        ("ERPO eq 8. Gate.", [("ERPO", 8)]),
        ("Eq 21; ERPO eq 4-5. KL.", [("E3RL", 21), ("ERPO", 4), ("ERPO", 5)]),
        ("The threshold of eq 17.", []),
        ("Eq 17 is cited without a full stop", []),
        ("", []),
    ],
)
def test_cited(docstring: str, expected: list[tuple[str, int]]) -> None:
    assert list(tool.cited(docstring)) == expected


def test_a_complete_repository_passes(repository: Path) -> None:
    assert check(repository) == 0


def replace(root: Path, file: str, old: str, new: str) -> None:
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "kind"),
    [
        ("e3rl/equations/everything.py", " 13, 14", " 14", "function"),
        ("tests/test_all.py", "Eq 1-35", "Eq 1-12, 14-35", "test"),
    ],
)
def test_a_gap_is_noticed(
    repository: Path, file: str, old: str, new: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(repository, file, old, new)
    assert tool.main(["--root", str(repository)]) == 1
    assert check(repository) == 1  # a fresh page does not hide it
    assert f"E3RL eq 13 has no {kind}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("e3rl/rollout/judge.py", "everything.all_of_it()", "None"),  # nobody names it
        ("e3rl/train/loop.py", LOOP, ""),  # who names it is not part of training
    ],
)
def test_a_function_that_nothing_calls_is_noticed(
    repository: Path, file: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(repository, file, old, new)
    assert tool.main(["--root", str(repository)]) == 1
    assert "everything.py: all_of_it is called by nothing that trains or decodes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "loop",
    [
        "def load():\n    from e3rl.rollout.judge import decide\n",
        'KINDS = {"judge": "e3rl.rollout.judge:decide"}\n',  # a table of plug-ins
    ],
)
def test_late_imports_and_tables_of_plug_ins_count(repository: Path, loop: str) -> None:
    (repository / "e3rl/train/loop.py").write_text(loop)
    assert check(repository) == 0


def test_the_page_says_who_calls(repository: Path) -> None:
    page = (repository / "docs/equations.md").read_text()
    function = "[all_of_it](../e3rl/equations/everything.py)"
    meaning = f"segment uncertainty U<br>$`{tool.FORMULAS['E3RL']['13']}`$"
    row = f"| 13 | {meaning} | {function} | [judge.decide](../e3rl/rollout/judge.py) |"
    assert f"{row} [test_all](../tests/test_all.py) |" in page


def test_calls_are_followed_through_the_equations(repository: Path) -> None:
    (repository / "e3rl/equations/more.py").write_text("def helper():\n    return 1\n")
    assert check(repository) == 1
    replace(
        repository, "e3rl/equations/everything.py", "def all", "from e3rl.equations.more import helper\n\n\ndef all"
    )
    with (repository / "e3rl/equations/everything.py").open("a") as file:
        file.write("    return helper()\n")
    assert check(repository) == 0


def test_a_definition_with_a_function_is_noticed(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace(repository, "e3rl/equations/everything.py", " 13, 14", " 3, 13, 14")
    assert check(repository) == 1
    assert "E3RL eq 3 has a function and is listed as a definition" in capsys.readouterr().err


def test_helpers_of_tests_are_no_tests(repository: Path) -> None:
    replace(repository, "tests/test_all.py", "test_everything", "helper")
    assert tool.main(["--root", str(repository)]) == 1


def test_a_stale_or_missing_page_is_noticed(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace(repository, "e3rl/rollout/judge.py", "decide", "choose")
    replace(repository, "e3rl/train/loop.py", "decide", "choose")
    assert check(repository) == 1
    assert "stale" in capsys.readouterr().err
    assert tool.main(["--root", str(repository)]) == 0
    assert check(repository) == 0
    (repository / "docs" / "equations.md").unlink()
    assert check(repository) == 1


def test_an_equation_that_does_not_exist_is_noticed(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace(repository, "e3rl/equations/everything.py", "; ERPO eq 1", ", 36; ERPO eq 1")
    assert tool.main(["--root", str(repository)]) == 1
    assert "e3rl/equations/everything.py: all_of_it names E3RL eq 36, which does not exist" in capsys.readouterr().err
