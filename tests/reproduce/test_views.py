"""What the pages say, from measurements written by hand: means, intervals, margins, learning rates, curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from e3rl.files import write_json, write_text
from e3rl_reproduce.cells import Cell, Measure
from e3rl_reproduce.output import Plot, Table
from e3rl_reproduce.reproduce import report
from e3rl_reproduce.results import Results, chosen_rates, study_cells
from e3rl_reproduce.studies import STUDIES
from e3rl_reproduce.study import LAB, plain_exams, tuning_cells

TABLE1 = STUDIES["table1"]
RIGHT = {"Vanilla": 1, "GRPO": 4, "DAPO": 3, "GSPO": 4, "SAPO": 3, "ERPO": 2, "E3RL": 4}
"""Of eight samples of each problem with seed 0; E3RL has one more with each further seed."""


ENVIRONMENT = {"commit": "abc", "cores": "2", "processor": "CPU", "torch": "2.13", "transformers": "5.23"}


def _write(cell: Cell, measure: Measure, right: int, out: Path) -> None:
    values = {
        name: {"right": [right, right], "samples": 8, "finish_ratio": 1.0, "boxed": 0.0, "length": 9.0, "r": 0.0}
        for name in measure.options["benchmarks"]
    }
    path = cell.directory(out) / "measures" / f"{measure.address}.json"
    write_json(path, {**measure.to_table(), "step": 24, "tokens": 1000, "values": values, "environment": ENVIRONMENT})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Table 1 at lab scale, as if it had run: at equal tokens every method has one more right than at equal steps."""
    for (name, rate), cell in tuning_cells(TABLE1, LAB, "lab model").items():
        _write(cell, cell.measures[0], 5 if rate == (7.5e-5 if name == "GRPO" else 1.5e-4) else 2, tmp_path)
    for (row, seed), cell in study_cells(TABLE1, LAB, "lab model", tmp_path).items():
        for measure in cell.measures:
            more = (seed if row == "E3RL" else 0) + (measure.at == "tokens")
            _write(cell, measure, RIGHT[row] + more, tmp_path)
        lines = [{"step": s, "accuracy": 0.1 * s + 0.01 * seed, "uncertainty": [1.0, None, 2.0]} for s in (1, 2)]
        write_text(cell.directory(tmp_path) / "run" / "metrics.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    return tmp_path


def _part(study: str, title: str, out: Path) -> Any:
    results = Results.read(STUDIES[study], LAB, "lab model", out)
    parts: list[Table | Plot] = [part for view in STUDIES[study].views for part in view(results)]
    return next(part for part in parts if part.title == title)


def test_each_method_gets_the_best_rate_of_its_sweep_and_ablations_get_that_of_the_full_method(out: Path):
    rates = chosen_rates(TABLE1, LAB, "lab model", out)
    assert (rates["GRPO"], rates["E3RL"], rates["Vanilla"]) == (7.5e-5, 1.5e-4, None)
    assert set(chosen_rates(STUDIES["table2"], LAB, "lab model", out).values()) == {1.5e-4}
    row = next(r for r in _part("table1", "Learning rates", out).rows if r[0] == "GRPO")
    assert row == ("GRPO", "0.250", "0.250", "0.625", "0.250", "7.5e-05")


def test_the_table_has_means_and_intervals_over_seeds(out: Path):
    rows = {row[0]: row for row in _part("table1", "Avg@8, plain decoding, equal steps", out).rows}
    assert rows["GRPO"][1] == "0.500 ± 0.000"
    assert rows["E3RL"][1] == "0.625 ± 0.311"  # 4, 5, 6 of 8; 4.303 · 0.125 / √3
    assert rows["E3RL"][-3:] == ("24", "1,000", "3")


def test_margins_are_over_the_best_baseline_and_over_the_papers_choice(out: Path):
    rows = _part("table1", "Margin of E3RL in Avg@8", out).rows
    assert rows[0][:5] == ("ours, equal steps", "best baseline", "GRPO", "+0.125 ± 0.311", "+25.0 %")
    assert rows[1][2:5] == ("SAPO", "+0.250 ± 0.311", "+66.7 %")
    assert rows[2][0] == "ours, equal generated tokens"
    assert ("paper, Qwen3-8B", "best baseline", "DAPO", "+0.024", "+4.286 %", "–") in rows


def test_curves_average_over_seeds_and_leave_gaps_out(out: Path):
    panel = _part("fig3", "Training dynamics", out).panels[0]
    line = next(x for x in panel.lines if x.label == "GRPO")
    assert line.x == (1, 2)
    assert line.y == pytest.approx((0.11, 0.21))
    assert line.high[0] - line.y[0] == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)
    segments = next(
        p for p in _part("fig6", "Uncertainty by segment over training", out).panels if p.title == "erase@5"
    )
    assert [x.y for x in segments.lines] == [(1.0, 1.0), (), (2.0, 2.0)]


def test_what_has_not_run_is_named_and_the_rest_is_reported(out: Path):
    cells = study_cells(TABLE1, LAB, "lab model", out)
    for measure in plain_exams(LAB):
        (cells["GSPO", 2].directory(out) / "measures" / f"{measure.address}.json").unlink()
    page = report(TABLE1, LAB, out).read_text(encoding="utf-8")
    assert "**Missing (lab model):** GSPO, seed 2." in page
    assert "Measured at commit abc; 2 cores of CPU; torch 2.13, transformers 5.23." in page
    line = next(x for x in page.splitlines() if x.startswith("| GSPO | 0.5"))
    assert line.endswith("| 2 |")
