"""A diagnosis as a separate page with a JSON file, and as terminal tables."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from e3rl.diagnose.advice import advise
from e3rl.diagnose.diagnosis import Diagnosis
from e3rl.diagnose.statistics import Estimate
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


def _cell(estimate: Estimate | None) -> str:
    if estimate is None or estimate.value is None:
        return "–"
    bounds = "" if estimate.low is None or estimate.high is None else f" ({estimate.low:.2f}–{estimate.high:.2f})"
    return f"{estimate.value:.3f}{bounds}"


def signal_table(diagnosis: Diagnosis) -> Table:
    """AUROC of every signal, overall and among draws from the same prefix."""
    what = "first wrong step" if diagnosis.by_steps else "wrong answer"
    table = Table(title=f"AUROC against: {what}", title_justify="left")
    table.add_column("signal", no_wrap=True)
    for column in ("all segments", "same prefix", "pairs"):
        table.add_column(column, justify="right", no_wrap=True)
    for signal in diagnosis.signals:
        table.add_row(signal.name, _cell(signal.overall), _cell(signal.within), str(signal.within.count))
    return table


def decoding_table(diagnosis: Diagnosis) -> Table:
    """Accuracy and tokens of every way to decode."""
    k = diagnosis.samples
    table = Table(title="Decoding, erased tokens and votes charged", title_justify="left")
    table.add_column("decoding", overflow="fold", min_width=16)
    for column in (f"Avg@{k}", f"Pass@{k}", "tokens/answer"):
        table.add_column(column, justify="right", no_wrap=True)
    for decoding in diagnosis.decodings:
        table.add_row(decoding.name, _cell(decoding.avg), _cell(decoding.passed), f"{decoding.tokens:.1f}")
    return table
