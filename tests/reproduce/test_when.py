"""`e3rl reproduce when`: what is chosen where, and the smallest whole run of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from e3rl.cli.main import main
from e3rl.diagnose.decoding import SETTINGS
from e3rl_reproduce.measures import DecodingWay
from e3rl_reproduce.study import LAB, PAPER, SMOKE, row_config
from e3rl_reproduce.when import WHEN, chosen, figures
from e3rl_reproduce.when_methods import BASELINES, METHODS, families, label, methods, ways

WAYS = [DecodingWay(*fields) for fields in ways(LAB)]


def values(train: dict[str, list[int]], held_out: dict[str, list[int]]) -> dict[str, dict[str, dict[str, object]]]:
    def half(right: list[int]) -> dict[str, object]:
        return {"right": right, "samples": 4, "tokens": 5.0}

    nothing = [0, 0]
    return {
        way.name: {
            "kind": way.kind,
            "train": half(train.get(way.name, nothing)),
            "eval": half(held_out.get(way.name, nothing)),
        }
        for way in WAYS
    }


def test_a_way_is_chosen_on_training_problems_whatever_the_held_out_ones_say() -> None:
    plain = [way.name for way in WAYS if way.kind == "plain"]
    measured = values(train={plain[1]: [3, 1], plain[2]: [2, 1]}, held_out={plain[2]: [4, 4]})
    assert chosen(measured, "plain") == plain[1]
    assert chosen(values({plain[1]: [2, 2], plain[0]: [4, 0]}, {}), "plain") == plain[0]  # of equals the first


def test_avg_and_pass_by_problem() -> None:
    avg_P, pass_P = figures({"right": [0, 1, 4], "samples": 4})
    assert avg_P.tolist() == [0.0, 0.25, 1.0]
    assert pass_P.tolist() == [0.0, 1.0, 1.0]


def test_every_row_is_a_recipe_and_they_differ_by_their_method_alone() -> None:
    scale = WHEN.at("lab")
    rows = {row.label: row for row in WHEN.rows(scale)}
    assert list(rows) == [label(family, method) for family in families(scale) for method in methods(scale)]
    configs = {name: row_config(scale, "lab model", row, seed=1, learning_rate=None) for name, row in rows.items()}
    assert {config.train.max_tokens for config in configs.values()} == {16000}
    assert {config.train.learning_rate for config in configs.values()} == {1e-4}
    for family in families(scale):
        here = methods(scale)
        assert all(configs[label(family, m)].data.train == family for m in here)
        assert all(configs[label(family, m)].rollout.erase != (m in BASELINES) for m in here)
    late = configs[label("lab:path:2", "E³RL late+contrast")]
    assert late.rollout.segment_length * late.rollout.max_segments == late.rollout.completion_limit == 8
    assert (late.erasure.gradient_weight, late.erasure.kappa0) == (0, -0.5)
    assert late.objective.options["erased"] == "contrast"
    anchored = configs[label("lab:path:2", "E³RL+ε, anchored")]
    assert (anchored.objective.options["allocation"], anchored.erasure.perturbation_weight) == ("anchored", 1.0)


@pytest.mark.parametrize("scale", ["smoke", "lab", "smollm2", "paper"])
def test_ways_name_settings_that_exist_and_hold_both_kinds(scale: str) -> None:
    here = [DecodingWay(*fields) for fields in ways(WHEN.at(scale))]
    assert here[0] == DecodingWay(1.0)
    assert all(way.setting in SETTINGS for way in here if way.setting)
    assert {way.kind for way in here} == {"plain", "erasable"}
    assert len({way.name for way in here}) == len(here)


def test_a_measure_in_other_ways_is_another_measure() -> None:
    [one], [other] = (WHEN.measures(WHEN.at(scale)) for scale in ("lab", "smollm2"))
    same_sizes = replace(other, options={**one.options, "ways": other.options["ways"]})
    assert one.address != same_sizes.address


def test_late_methods_judge_a_response_as_one_segment_as_long_as_the_recipe_s() -> None:
    scale = WHEN.at("smollm2")
    rows = {row.label: row for row in WHEN.rows(scale)}
    late, segmented = (
        row_config(scale, "SmolLM2-135M", rows[name], seed=0, learning_rate=None).rollout
        for name in ("E³RL late+ε+contrast", "E³RL+ε+contrast")
    )
    assert (late.segment_length, late.max_segments) == (32, 1)
    assert (segmented.segment_length, segmented.max_segments) == (8, 4)


def test_other_scales_keep_the_recipe_s_own_data() -> None:
    assert families(PAPER) == ("",)
    assert [row.label for row in WHEN.rows(PAPER)] == list(METHODS)
    assert len(WHEN.rows(SMOKE)) < len(METHODS)
    assert WHEN.measures(LAB)[0].options["tuning"] <= LAB.problems


def test_the_smoke_scale_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "when", "--scale", "smoke", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "when.md").read_text(encoding="utf-8")
    assert "Missing" not in page
    for part in (
        "The claim",
        "Avg by method",
        "lab:path:1: methods at equal generated tokens",
        "decoding the model as it is",
    ):
        assert part in page
    assert "E³RL late+ε+contrast" in page
    assert len(list((tmp_path / "cells").iterdir())) == 4
