"""Cells: the address is the content's, studies share cells, and a cell survives being written and read."""

from dataclasses import replace
from pathlib import Path

import pytest

from e3rl.cli.recipes import find_recipe
from e3rl.config import Config, load_config
from e3rl_reproduce.cells import Cell, Measure, merged, missing, read_measurement
from e3rl_reproduce.results import study_cells
from e3rl_reproduce.studies import STUDIES
from e3rl_reproduce.study import LAB, SCALES, models_of, tuning_cells

EXAM = Measure("package:function", "steps", {"samples": 4})


def _cell(*overrides: str, measures: tuple[Measure, ...] = (EXAM,)) -> Cell:
    return Cell(load_config(find_recipe("lab"), overrides=overrides), measures)


def test_what_does_not_change_the_outcome_does_not_change_the_address():
    assert _cell().address == _cell("run.name=other", "run.output_dir=there", "train.save_steps=7").address
    assert _cell().address == _cell("rollout.max_rows=32").address
    assert _cell().address == _cell(measures=()).address
    assert _cell().address == _cell(f"erasure.eta={Config().erasure.eta}").address


@pytest.mark.parametrize(
    "setting", ["run.seed=1", "erasure.kappa0=2", "objective.allocation=sequence", "train.steps=9", "model.path=other"]
)
def test_what_changes_the_outcome_changes_the_address(setting: str):
    assert _cell().address != _cell(setting).address


def test_a_token_budget_and_a_measures_options_are_part_of_their_addresses():
    assert _cell().address != replace(_cell(), token_budget=5).address
    assert EXAM.address != replace(EXAM, at="tokens").address != replace(EXAM, options={"samples": 5}).address


def test_a_cell_reads_back_as_it_was_written():
    cell = replace(_cell("objective.name=sapo"), token_budget=7)
    assert Cell.from_table(cell.to_table()) == cell


def test_the_same_training_is_one_cell_with_all_measures():
    other = replace(EXAM, options={"samples": 8})
    together = merged([_cell(), _cell("run.seed=1"), _cell(measures=(EXAM, other))])
    assert [len(cell.measures) for cell in together] == [2, 1]
    assert together[0].measures == (EXAM, other)


def test_what_is_not_on_disk_is_missing(tmp_path: Path):
    assert missing(_cell(), tmp_path) == [EXAM]
    assert read_measurement(_cell(), EXAM, tmp_path) is None


def test_tables_share_their_cells(tmp_path: Path):
    found = {
        name: study_cells(STUDIES[name], LAB, "lab model", tmp_path) for name in STUDIES if name.startswith("table")
    }
    full = found["table1"]["E3RL", 0].address
    same = (("table2", "E3RL"), ("table3", "E3RL"), ("table4", "erase@5"), ("table5", "8x8"), ("table6", "E3RL"))
    assert {found[name][row, 0].address for name, row in same} == {full}
    everything = [cell for cells in found.values() for cell in cells.values()]
    assert len(merged(everything)) == 3 * (7 + 6 + 6 + 2 + 4)


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_row_of_every_study_is_a_valid_cell_of_its_own(name: str, scale: str, tmp_path: Path):
    study = STUDIES[name]
    own = study.at(scale)
    for model in models_of(study, own):
        cells = study_cells(study, own, model, tmp_path)
        assert (
            len({cell.address for cell in cells.values()})
            == len(cells)
            == sum(min(row.seeds or len(own.seeds), len(own.seeds)) for row in study.rows(own))
        )
        assert all(cell.config.objective.name != "vanilla" for cell in tuning_cells(study, own, model).values())


def test_rows_of_a_table_differ_in_nothing_but_what_they_are_named_for(tmp_path: Path):
    cells = study_cells(STUDIES["table3"], LAB, "lab model", tmp_path)

    def told(row: str) -> dict[str, object]:
        config = cells[row, 0].config
        return {"eta": config.erasure.eta, "baseline": config.erasure.baseline, **config.objective.options}

    off = {
        "frequency penalty": {"eta": 0.0},
        "causal allocation": {"allocation": "sequence"},
        "group dynamics": {"baseline": "static"},
    }
    for part in off:
        assert told(f"w/o {part}") == told("E3RL") | off[part]
        others = {key: value for other, change in off.items() if other != part for key, value in change.items()}
        assert told(f"ow {part}") == told("E3RL") | others


def test_methods_are_compared_on_the_same_problems_weights_and_steps(tmp_path: Path):
    cells = [
        c.config for (_, seed), c in study_cells(STUDIES["table1"], LAB, "lab model", tmp_path).items() if seed == 1
    ]
    assert len({(c.model, c.data, c.run.seed, c.eval) for c in cells}) == 1
    assert (
        len({(c.train.steps, c.train.prompts_per_step, c.train.minibatches, c.rollout.num_generations) for c in cells})
        == 1
    )
