"""The documentation builds as a site: strictly, so that a page left out of the navigation or a dead link fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path):
    pytest.importorskip("material", reason="mkdocs-material is not installed: make test does")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r'<(?:script|img)[^>]+src="https?:|<link[^>]+rel="stylesheet"[^>]+href="https?:', home)
    assert (tmp_path / "site" / "how-to" / "own-reward.html").is_file()
    listed = set(re.findall(r'href="results/([\w-]+)\.html"', home))
    assert listed == {p.stem for p in (ROOT / "docs" / "results").glob("*.md")}
