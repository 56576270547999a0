"""The documentation builds as a site: strictly, so that a page left out of the navigation or a dead link fails."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tomllib
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
    assert re.search(r'<img[^>]+src="img/report-rollout.png"', home)
    assert (tmp_path / "site" / "how-to" / "own-reward.html").is_file()
    listed = set(re.findall(r'href="results/([\w-]+)\.html"', home))
    assert listed == {p.stem for p in (ROOT / "docs" / "results").glob("*.md")}


def test_formulas_are_mathematics():
    pytest.importorskip("latex2mathml", reason="latex2mathml is not installed: make test does")
    hooks = runpy.run_path(str(ROOT / "tools" / "docs_hooks.py"))
    page = hooks["on_page_content"]("<td>mean<br>$<code>a_t \\leq \\frac{1}{L}</code>$</td><p><code>$x</code></p>")
    assert page.startswith("<td>mean<br><math ")
    assert "<mfrac><mrow><mn>1</mn></mrow><mrow><mi>L</mi></mrow></mfrac>" in page
    assert "<code>$x</code>" in page
    formulas = tomllib.loads((ROOT / "tools" / "equations.toml").read_text(encoding="utf-8"))
    for latex in (latex for paper in formulas.values() for latex in paper.values()):
        drawn = hooks["mathml"](latex)
        assert drawn.startswith("<math "), latex
        assert "\\" not in drawn, latex
