"""What the wheel carries (files that are no Python are named in pyproject.toml), and the scripts that set it up."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import e3rl

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_no_file_of_the_package_is_left_behind():
    package = ROOT / "e3rl"
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["e3rl"]
    carried = {path for pattern in patterns for path in package.glob(pattern)}
    there = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert there - carried == set()
    assert package / "py.typed" in carried


def test_the_version_is_told_in_one_way():
    assert PROJECT["project"]["version"] == e3rl.__version__
    assert f"## {e3rl.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", ["setup.py", "setup_vllm.py", "setup_deepspeed.py"])
def test_setup_scripts_refuse_what_they_do_not_know(script: str):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / script), "tset"],
        capture_output=True, text=True, check=False, env={"E3RL_VENV": "/nowhere"}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("setup: ")
    assert "tset" in done.stderr
