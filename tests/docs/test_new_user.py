"""The path of a new user is a script that takes minutes; that its commands exist and are in order is seen in moments."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from e3rl.errors import UserError
from tests.docs.pages import ROOT
from tests.docs.test_snippets import check_command

SCRIPT = ROOT / "tools" / "new_user.sh"


def e3rl_commands(script: str) -> list[str]:
    """Its calls of e3rl, arrays filled in."""
    (small,) = re.findall(r"^small=\((.*)\)$", script, re.M)
    (run,) = re.findall(r'^run=\("\$bin/e3rl" (.*)\)$', script, re.M)
    text = script.replace("\\\n", " ").replace('"${run[@]}"', f'"$bin/e3rl" {run}').replace('"${small[@]}"', small)
    calls = re.findall(r'"\$bin/e3rl" (.*?)(?= >| \|\||\)$|$)', text, re.M)
    return [f"e3rl {call}" for call in calls]


def test_its_commands_are_understood():
    found = e3rl_commands(SCRIPT.read_text(encoding="utf-8"))
    assert {c.split()[1] for c in found} >= {"train", "decode", "init", "data", "serve"}
    assert sum("--resume" in c for c in found) == 1
    for command in found:
        check_command(command)


def test_a_wrong_command_in_it_would_be_noticed():
    script = SCRIPT.read_text(encoding="utf-8").replace("train.steps=2", "train.stepz=2")
    wrong = next(c for c in e3rl_commands(script) if "stepz" in c)
    with pytest.raises(UserError, match="stepz"):
        check_command(wrong)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_it_is_a_shell_script():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0


def test_what_is_said_to_hold_a_friction_off_is_a_test():
    rows = (
        (ROOT / "docs" / "results" / "first-contact.md")
        .read_text(encoding="utf-8")
        .split("| held by |\n")[1]
        .splitlines()[1:]
    )
    named = {name for row in rows for name in row.rstrip(" |").rpartition(" | ")[2].split(", ")} - {"once by hand"}
    assert len(rows) > 60
    assert {name for name in named if not (ROOT / "tests" / f"{name}.py").is_file()} == set()


def test_nobody_is_told_to_take_e3rl_from_an_index():
    """It is installed from a checkout; of an installed one an index is asked for an extra's packages alone."""
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *(p for p in ROOT.glob("examples/*") if p.is_file())]
    told = {p.name for p in pages if re.search(r"pip install ['\"]?e3rl(?!\[)", p.read_text(encoding="utf-8"))}
    assert told == set()
