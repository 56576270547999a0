"""`e3rl reproduce settle`: what is compared with what, by value, and the smallest whole run of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from e3rl.cli.main import main
from e3rl.errors import UserError
from e3rl.files import write_json
from e3rl.lab import lab_directory
from e3rl_reproduce.reproduce import tasks
from e3rl_reproduce.results import Results
from e3rl_reproduce.settle import (
    CONTRAST,
    CREDIT,
    DROPPED,
    GRPO,
    LOSS,
    SETTLE,
    after,
    bound_table,
    pairs_table,
    predicted_table,
    progress_plot,
)
from e3rl_reproduce.study import row_config


def run(*points: tuple[int, int, float, float], r: float = 0.0) -> dict[str, object]:
    return {"curve": points, "tokens": points[-1][1], "seconds": 1.0, "r": r}


MEASURED = {
    (GRPO, 0): run((0, 0, 0.1, 0.2), (16, 1000, 0.4, 0.6)),
    (GRPO, 1): run((0, 0, 0.1, 0.2), (16, 2000, 0.5, 0.7)),
    (CONTRAST, 0): run((0, 0, 0.1, 0.2), (8, 800, 0.4, 0.5), (16, 1600, 0.8, 0.9), r=0.5),  # at 1,000 tokens 0.5, 0.6
    (CONTRAST, 1): run((0, 0, 0.1, 0.2), (8, 1000, 0.5, 0.5), (16, 3000, 0.9, 0.9), r=0.7),  # at 2,000 tokens 0.7, 0.7
    (CREDIT, 1): run((0, 0, 0.1, 0.2), (16, 2000, 0.6, 0.7)),
}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    scale = replace(SETTLE.at("lab"), seeds=(0, 1))
    found = Results.read(SETTLE, scale, "lab model", tmp_path)
    for key, values in MEASURED.items():
        cell = found.cells[key]
        write_json(cell.directory(tmp_path) / "measures" / f"{cell.measures[0].address}.json", {"values": values})
    return found


def test_equal_tokens_lie_on_a_straight_line_between_evaluations() -> None:
    of = MEASURED[CONTRAST, 0]
    assert after(of, 1000) == pytest.approx((0.5, 0.6))
    assert after(of, 99_999) == after(of) == (0.8, 0.9)


def test_differences_are_paired_by_seed_at_the_tokens_of_the_same_seed_s_grpo(results: Results) -> None:
    [table] = bound_table(results)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows[GRPO][:1] == ("0.450 ± 0.635",)  # Student's t of two seeds: 12.7 standard errors
    steps, more, tokens, ahead, passed, ratio, r, seeds = rows[CONTRAST]
    assert [x.split(" ")[0] for x in (steps, more, tokens, ahead, passed)] == [
        "0.850",
        "+0.400",
        "0.600",
        "+0.150",
        "0.650",
    ]
    assert (ratio, r, seeds) == ("1.55", "0.60", "2")
    assert rows[LOSS] == ("–",) * 7 + ("0",)
    assert results.absent()[:3] == [f"{DROPPED}, seeds 0, 1", f"{LOSS}, seeds 0, 1", f"{CREDIT}, seed 0"]
    [pairs] = pairs_table(results)
    assert pairs.rows == ((f"{CONTRAST} − {CREDIT}", "+0.300", "+0.100", "1"),)  # seed 1 alone has both
    [predicted] = predicted_table(results)
    assert predicted.rows[-1][0] == "0.95"
    assert predicted.rows[-1][-1] == "0.60"
    [plot] = progress_plot(results)
    lines = {line.label: line for line in plot.panels[0].lines}
    assert lines[CONTRAST].x == (0, 900, 2300)
    assert lines[CONTRAST].y == pytest.approx((0.1, 0.45, 0.85))


def test_rows_differ_in_nothing_but_what_they_are_named_for() -> None:
    scale = SETTLE.at("lab")
    of = {row.label: row_config(scale, "lab model", row, seed=3, learning_rate=None) for row in SETTLE.rows(scale)}
    assert {(c.data, c.eval, c.run.seed, c.rollout.completion_limit) for c in of.values()} == {
        (of[GRPO].data, of[GRPO].eval, 3, 64)
    }
    assert {replace(c.train, max_tokens=0) for c in of.values()} == {of[GRPO].train}
    assert of[CREDIT].erasure == replace(of[CONTRAST].erasure, max_erasures=0)  # judged alike, never erased
    assert of[LOSS].objective == replace(of[CONTRAST].objective, options={"allocation": "sequence"})
    assert of[CREDIT].objective.options == of[LOSS].objective.options
    assert [label for label, c in of.items() if not c.rollout.erase] == [GRPO, LOSS]
    metrics = {label: c.erasure.metric for label, c in of.items() if c.rollout.erase}
    assert all(metric.endswith(label.split("0.")[1][:2]) for label, metric in metrics.items())


def test_only_lab_problems_have_an_oracle(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its scales are smoke and lab"):
        tasks(["settle"], "paper", out=tmp_path)


def test_the_smoke_scale_runs_on_worse_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "settle", "--scale", "smoke", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "settle.md").read_text(encoding="utf-8")
    assert "Missing" not in page
    assert f"| {CONTRAST} − {CREDIT} |" in page
    assert math.isfinite(float(page.rpartition("| all | ")[2].split(" ")[0]))
    assert len(list((tmp_path / "cells").iterdir())) == 3
    before, [worse] = load_file(lab_directory() / "model.safetensors"), tmp_path.glob("weakened-*/model.safetensors")
    for name, weight in load_file(worse).items():
        moved = float((weight - before[name].float()).std() / before[name].float().std()) if weight.ndim == 2 else 0.09
        assert moved == pytest.approx(0.09, rel=0.05), name
