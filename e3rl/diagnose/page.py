"""The diagnosis as a page of its own, and as JSON beside it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from e3rl.diagnose.advice import advise
from e3rl.diagnose.diagnosis import Diagnosis
from e3rl.files import write_json, write_text
from e3rl.report.embed import to_json
from e3rl.report.page import render_page

SCRIPTS = ("dom.js", "charts.js", "diagnose.js")
PAGE_NAME, JSON_NAME = "diagnosis.html", "diagnosis.json"


def write_diagnosis(directory: Path, diagnosis: Diagnosis) -> Path:
    """Write page and figures; returns the page's path."""
    directory.mkdir(parents=True, exist_ok=True)
    tables = {**diagnosis.to_tables(), "findings": [asdict(f) for f in advise(diagnosis)]}
    write_json(directory / JSON_NAME, tables)
    page = render_page(
        f"{diagnosis.model} on {diagnosis.data} · E³RL", SCRIPTS, {"diagnosis": to_json(tables)}, charts=True
    )
    path = directory / PAGE_NAME
    write_text(path, page)
    return path
