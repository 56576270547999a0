"""`e3rl reproduce settle`: what is compared with what, by value, and the smallest whole run of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from e3rl.cli.main import main
from e3rl.config import load_config
from e3rl.errors import UserError
from e3rl.files import write_json
from e3rl.lab import lab_directory
from e3rl_reproduce.reproduce import tasks
from e3rl_reproduce.results import Results
from e3rl_reproduce.resumed import GENERATED
from e3rl_reproduce.settle import (
    CONFIRM,
    SETTLE,
    after,
    bound_table,
    claims_table,
    colder_table,
    curve,
    finishing_table,
    pairs_table,
    predicted_table,
    progress_plot,
)
from e3rl_reproduce.settle_rows import (
    CAREFUL,
    COLDER,
    CONTRAST,
    CREDIT,
    DROPPED,
    GRPO,
    LEARNT,
    LIKELY,
    LOSS,
    PRUNED,
    RESET,
    settings,
)
from e3rl_reproduce.settle_scales import MORE_NOISE, NOISE, weakened_name
from e3rl_reproduce.study import Row, row_config


def run(*points: tuple[int, int, float, float, float], r: float = 0.0) -> dict[str, object]:
    return {"curve": points, "tokens": points[-1][1], "seconds": 1.0, "r": r}


MEASURED = {
    (GRPO, 0): run((0, 0, 0.1, 0.2, 0.5), (16, 1000, 0.4, 0.6, 0.8)),
    (GRPO, 1): run((0, 0, 0.1, 0.2, 0.5), (16, 2000, 0.5, 0.7, 0.8)),
    # at 1,000 tokens 0.5, 0.6, 0.8; at 2,000 tokens of seed 1 0.7, 0.7, 0.9
    (CONTRAST, 0): run((0, 0, 0.1, 0.2, 0.5), (8, 800, 0.4, 0.5, 0.8), (16, 1600, 0.8, 0.9, 0.8), r=0.5),
    (CONTRAST, 1): run((0, 0, 0.1, 0.2, 0.5), (8, 1000, 0.5, 0.5, 0.8), (16, 3000, 0.9, 0.9, 1.0), r=0.7),
    (CREDIT, 1): run((0, 0, 0.1, 0.2, 0.5), (16, 2000, 0.6, 0.7, 0.8)),
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
    assert after(of, 1000) == pytest.approx((0.5, 0.6, 0.8))
    assert after(of, 99_999) == after(of) == (0.8, 0.9, 0.8)


def test_differences_are_paired_by_seed_at_the_tokens_of_the_same_seed_s_grpo(results: Results) -> None:
    table = bound_table(results)[0]
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
    assert f"{DROPPED}, seeds 0, 1" in results.absent()

    [pairs] = pairs_table(results)
    assert pairs.rows == ((f"{CONTRAST} − {CREDIT}", "+0.300", "+0.100", "1"),)  # seed 1 alone has both
    [predicted] = predicted_table(results)
    assert predicted.rows[-1][:4] == ("chain 4", "0.10", "8", "0.95")
    assert predicted.rows[-1][-1] == "0.60"
    [plot] = progress_plot(results)
    lines = {line.label: line for line in plot.panels[0].lines}
    assert lines[CONTRAST].x == (0, 900, 2300)
    assert lines[CONTRAST].y == pytest.approx((0.1, 0.45, 0.85))


def test_a_right_answer_has_to_end_and_to_be_right(results: Results) -> None:
    table = finishing_table(results)[0]
    rows = {row[0]: [cell.split(" ")[0] for cell in row[1:]] for row in table.rows}
    assert rows[CREDIT] == ["0.800", "0.750", "0.800", "0.750"]
    assert rows[CONTRAST] == [
        "0.900",
        "0.950",
        "0.850",
        "0.701",
    ]  # (0.8 / 0.8 + 0.9 / 1) / 2; (0.5 / 0.8 + 0.7 / 0.9) / 2
    assert rows[LOSS] == ["–"] * 4
    assert table.note == "At first 0.500 ± 0.000 end."


def test_the_temperature_is_chosen_on_training_problems(results: Results) -> None:
    def decoded(train: int, held_out: int) -> dict[str, object]:
        halves = {"train": {"right": [train]}, "eval": {"right": [held_out], "samples": 4}}
        return {"kind": "plain", **halves}

    assert colder_table(results) == []
    for label, ways in ((GRPO, [(1, 1), (2, 2), (3, 0)]), (LEARNT, [(1, 3), (3, 1), (2, 4)])):
        values = {f"plain, T = {t}": decoded(*way) for t, way in zip(("1", "0.6", "0.3"), ways, strict=True)}
        cell = results.cells[label, 0]
        write_json(cell.directory(results.out) / "measures" / f"{COLDER.address}.json", {"values": values})
    [table] = colder_table(results)
    assert table.rows == (
        (GRPO, "0.250", "+0.000", "0.000", "+0.000", "1"),  # at T = 0.3, which is best on training problems
        (LEARNT, "0.750", "+0.500", "0.250", "+0.250", "1"),
    )


def test_rows_differ_in_nothing_but_what_they_are_named_for() -> None:
    scale = SETTLE.at("lab")
    for setting in settings(scale):
        of = {row.label: row_config(scale, "lab model", row, seed=3, learning_rate=None) for row in setting.rows}
        base = of[setting.base]
        assert {(c.data, c.eval, c.run.seed, c.rollout.completion_limit) for c in of.values()} == {
            (base.data, base.eval, 3, base.rollout.completion_limit)
        }
        assert {replace(c.train, max_tokens=0) for c in of.values()} == {base.train}
        assert not base.rollout.erase
        metrics = {label: c.erasure.metric for label, c in of.items() if "oracle" in c.erasure.metric}
        assert all(metric.endswith(label.rpartition("0.")[2][:2]) for label, metric in metrics.items())
    of = {row.label: row_config(scale, "lab model", row, seed=3, learning_rate=None) for row in SETTLE.rows(scale)}
    assert of[CREDIT].erasure == replace(of[CONTRAST].erasure, max_erasures=0)  # judged alike, never erased
    assert of[LOSS].objective == replace(of[CONTRAST].objective, options={"allocation": "sequence"})
    assert of[CREDIT].objective.options == {**of[LOSS].objective.options, "credit_weight": 1}
    assert of[LIKELY].objective == of[LEARNT].objective == of[CREDIT].objective
    assert (of[RESET].erasure, of[RESET].objective) == (of[CREDIT].erasure, of[GRPO].objective)
    assert (of[LEARNT].erasure.max_erasures, of[LIKELY].erasure.max_erasures) == (0, 0)


def test_the_overlay_is_the_row_that_was_measured() -> None:
    scale = CONFIRM.at("lab")
    of = {row.label: row_config(scale, "lab model", row, seed=8, learning_rate=None) for row in CONFIRM.rows(scale)}
    overlaid = Row("overlay", ("methods/step-credit",), ("train.learning_rate=1e-4",))
    measured = of[f"rate 1e-4: {LEARNT}"]
    assert row_config(scale, "lab model", overlaid, seed=8, learning_rate=None) == measured
    options = {**measured.objective.options, "credit_groups": "mixed"}
    careful = replace(measured, objective=replace(measured.objective, options=options))
    assert of[f"rate 1e-4: {CAREFUL}"] == careful


def test_what_was_claimed_is_the_mean_difference_by_seed_from_both_others(tmp_path: Path) -> None:
    scale = CONFIRM.at("lab")
    results = Results.read(CONFIRM, scale, "lab model", tmp_path)
    before = (0, 0, 0.1, 0.2, 0.5)
    for label, (spent, avg, passed, colder) in {
        GRPO: (1000, 0.4, 0.6, 2),
        LOSS: (1000, 0.3, 0.5, 1),
        LEARNT: (2000, 0.9, 1.0, 4),  # at 1,000 tokens 0.5 and 0.6
    }.items():
        for seed in (8, 9):
            cell = results.cells[f"rate 1e-4: {label}", seed]
            decoded = {"kind": "plain", "train": {"right": [1]}, "eval": {"right": [colder], "samples": 4}}
            for measure, values in (
                (cell.measures[0], run(before, (16, spent, avg + 0.1 * (seed == 9), passed, 1.0))),
                (COLDER, {"plain, T = 0.3": decoded}),
            ):
                write_json(cell.directory(tmp_path) / "measures" / f"{measure.address}.json", {"values": values})
    [table] = claims_table(results)  # what has not run is left out
    short = [(name, *(cell.split(" ")[0] for cell in cells)) for name, *cells in table.rows]
    ours = f"rate 1e-4: {LEARNT}"
    assert short == [
        (f"{ours} − rate 1e-4: {GRPO}", "+0.075", "+0.500", "+0.000", "2"),
        (f"{ours} − rate 1e-4: {LOSS}", "+0.175", "+0.750", "+0.100", "2"),
    ]
    assert "± 0.318" in table.rows[0][1]  # +0.100 and +0.050: Student's t of two seeds
    assert {seed for _, seed in results.cells}.isdisjoint(SETTLE.at("lab").seeds)  # nothing was chosen with them


def test_only_lab_problems_have_an_oracle(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="their scales are smoke and lab"):
        tasks(["settle"], "paper", out=tmp_path)


def test_the_smoke_scale_runs_on_worse_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "settle", "--scale", "smoke", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "settle.md").read_text(encoding="utf-8")
    assert "Missing" not in page
    assert f"| {CONTRAST} − {CREDIT} |" in page
    assert math.isfinite(float(page.rpartition("| all | ")[2].split(" ")[0]))
    assert len(list((tmp_path / "cells").iterdir())) == 5
    before = load_file(lab_directory() / "model.safetensors")
    for noise in (NOISE, MORE_NOISE):
        for name, weight in load_file(tmp_path / weakened_name(noise) / "model.safetensors").items():
            moved = (weight - before[name].float()).std() / before[name].float().std() if weight.ndim == 2 else noise
            assert float(moved) == pytest.approx(noise, rel=0.05), name


def test_a_comparison_with_noise_of_its_own_trains_the_weights_beside_the_others(tmp_path: Path) -> None:
    scale = SETTLE.at("lab")
    prepared = replace(scale, overrides=(*scale.overrides, f"model.path={tmp_path / weakened_name(NOISE)}"))
    of = {
        row.label: row_config(prepared, "lab model", row, seed=0, learning_rate=None) for row in SETTLE.rows(prepared)
    }
    assert of[GRPO].model.path == str(tmp_path / "weakened-0.09")
    assert of[f"chain 4, start 0.05: {GRPO}"].model.path == str(tmp_path / "weakened-0.12")
    assert of[f"maze: {GRPO}"].model.path == "lab-maze"


def test_a_row_has_the_first_of_the_scale_s_seeds(results: Results, tmp_path: Path) -> None:
    assert {seed for label, seed in results.cells if label == PRUNED} == {0, 1}
    more = Results.read(SETTLE, replace(SETTLE.at("lab"), seeds=(9, 8, 7, 6, 5, 4)), "lab model", tmp_path)
    assert [seed for label, seed in more.cells if label == PRUNED] == [9, 8, 7, 6]
    assert len([seed for label, seed in more.cells if label == RESET]) == 6
    assert more.measurement(PRUNED, 5, COLDER) is None
    with pytest.raises(KeyError, match="has no row 'prunned'"):
        more.measurement("prunned", 9, COLDER)
    assert f"{PRUNED}, seeds 9, 8, 7, 6" in more.absent()


def test_what_was_generated_in_two_rounds_is_read_from_its_own_file(tmp_path: Path) -> None:
    """The groups of such a run hold a shared beginning twice. A step that was made again counts once."""
    times = {"seconds_rollout": 1.0, "seconds_reward": 0.0, "seconds_train": 0.5, "r": 0.0}
    lines = [{"step": step, "tokens_total": 1000 * step, **times} for step in (1, 2, 3)]
    evaluations = [{"step": s, "avg@4": 0.1 * s, "pass@4": 0.5, "finish_ratio": 1.0} for s in (0, 2, 3)]
    (tmp_path / "run").mkdir()
    for name, found in (("metrics", lines), ("evaluations", evaluations)):
        (tmp_path / "run" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    config = load_config(overrides=["eval.num_samples=4", "run.name=run", f"run.output_dir={tmp_path}"])
    assert [point[1] for point in curve(None, config)["curve"]] == [0, 2000, 3000]
    told = [
        {"step": 1, "tokens": 700},
        {"step": 2, "tokens": 90},
        {"step": 2, "tokens": 600},
        {"step": 3, "tokens": 650},
    ]
    (tmp_path / "run" / GENERATED).write_text("".join(json.dumps(line) + "\n" for line in told))
    found = curve(None, config)
    assert ([point[1] for point in found["curve"]], found["tokens"]) == ([0, 1300, 1950], 1950)
