"""The recipes are the papers: every number that they state stands in every resolved recipe, and changed ones are noticed."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import e3rl_reproduce
from e3rl.cli.recipes import find_recipe, find_recipes, recipe_names
from e3rl.config import Config, load_config, read_tables
from e3rl.data.benchmarks import BENCHMARKS
from e3rl.objectives import build
from e3rl_reproduce.paper import deviations, filled, paper_of, setting_of, stated
from e3rl_reproduce.reproduce import tasks
from e3rl_reproduce.running import departures
from e3rl_reproduce.studies import STUDIES
from e3rl_reproduce.study import models_of, row_config, varied
from tests.reproduce.means import FILE, means

PROJECT = Path(__file__).parents[2]
RECIPES = ("qwen3-4b", "qwen3-8b", "erpo-qwen2.5-1.5b", "erpo-qwen2.5-3b", "erpo-qwen2.5-7b")
METHODS = ("e3rl", "grpo", "dapo", "gspo", "sapo", "erpo", "sft", "vanilla")
SAME = (
    "model", "data.train", "data.train_limit", "data.eval", "data.max_prompt_length", "data.system_prompt", "rollout.temperature",
    "rollout.top_p", "rollout.top_k", "rollout.num_generations", "train", "eval",
)  # fmt: skip
"""What no method's overlay may touch."""


def _entries(recipe: str) -> list[Any]:
    return [*stated(paper_of(recipe)), *filled(paper_of(recipe))]


def _resolved(recipe: str, *overlays: str, settings: tuple[str, ...] = ()) -> Config:
    return load_config(find_recipe(recipe), find_recipes(overlays), settings)


@pytest.mark.parametrize(
    ("recipe", "method"),
    [(r, m) for r in RECIPES for m in METHODS if r.startswith("qwen3") or m in ("grpo", "erpo", "sft", "vanilla")],
)
def test_every_method_has_every_number_of_its_paper(recipe: str, method: str):
    config = _resolved(recipe, f"methods/{method}")
    assert deviations(config, _entries(recipe)) == []
    build(config.objective)
    assert config.objective.name == method


@pytest.mark.parametrize("name", STUDIES)
def test_every_row_of_every_study_has_them_but_for_what_it_varies(name: str):
    study = STUDIES[name]
    scale = study.at("paper")
    for model in models_of(study, scale):
        entries = _entries(scale.models[model])
        for row in study.rows(scale):
            config = row_config(scale, model, row, seed=0, learning_rate=None)
            assert deviations(config, entries, but=varied(row)) == [], row.label


def test_kl_is_that_of_the_paper_for_every_method_that_has_a_term():
    coefficients = {m: setting_of(_resolved("qwen3-4b", f"methods/{m}"), "objective.kl_coef") for m in METHODS}
    assert coefficients == {m: None if m in ("sft", "vanilla") else 0.04 for m in METHODS}
    assert load_config(find_recipe("qwen3-4b"), overrides=["objective.name=gspo"]).objective.options == {
        "kl_coef": 0.04
    }
    assert setting_of(load_config(None, find_recipes(["methods/dapo"])), "objective.kl_coef") == 0, "its own paper's"


@pytest.mark.parametrize("scale", ["lab", "smollm2", "paper"])
@pytest.mark.parametrize("name", STUDIES)
def test_grpo_and_e3rl_are_held_to_the_first_weights_alike(name: str, scale: str):
    study = STUDIES[name]
    own = study.at(scale)
    for model in models_of(study, own):
        configs = [row_config(own, model, row, seed=0, learning_rate=None) for row in study.rows(own)]
        weights = {setting_of(c, "objective.kl_coef") for c in configs if c.objective.name in ("grpo", "e3rl", "erpo")}
        assert len(weights) <= 1, f"{model}: KL weights {weights}"


def test_methods_differ_in_nothing_that_all_have_in_common():
    for recipe in RECIPES:
        plain = _resolved(recipe)
        for method in METHODS:
            config = _resolved(recipe, f"methods/{method}")
            for name in SAME:
                section, _, field = name.partition(".")
                before, now = (getattr(c, section) for c in (plain, config))
                assert (getattr(before, field), method) == (getattr(now, field), method) if field else before == now


def test_what_is_stated_covers_both_papers():
    """A number that goes from the table goes unnoticed: so the table itself is counted."""
    names = {part: {name for entry in stated(part) for name in entry.settings} for part in ("e3rl", "erpo", "topology")}
    assert {part: len(found) for part, found in names.items()} == {"e3rl": 26, "erpo": 18, "topology": 5}
    numbers = {
        "e3rl": "51k seven 32 2 128 1e-6 0.05 0.04 13,312 1,024 8 1.0 0.9 50 5",
        "erpo": "3 5 four 32 64 2048 16 8 5e-6 0.1 0.001",
        "topology": "32 ZeRO-2",
    }
    for part, wanted in numbers.items():
        text = " ".join(entry.quote for entry in stated(part))
        assert [number for number in wanted.split() if number not in text] == []


def test_the_paper_s_machines_are_an_overlay():
    for recipe in ("qwen3-4b", "qwen3-8b"):
        config = _resolved(recipe, "topologies/32xh100")
        assert deviations(config, [*_entries(recipe), *stated("topology")]) == []
        assert config.train.workers + config.rollout.workers == 32
        assert config.train.prompts_per_step // config.train.minibatches % config.train.workers == 0
    for topology in (name for name in recipe_names() if name.startswith("topologies/")):
        assert set(read_tables(find_recipe(topology))) <= {"rollout", "train"}


def test_benchmarks_of_the_recipes_are_there_and_are_those_of_the_tables():
    for name, study in STUDIES.items():
        scale = study.at("paper")
        for model in models_of(study, scale):
            config = _resolved(scale.models[model])
            assert set(config.data.eval) <= set(BENCHMARKS)
            if name not in ("when", "settle", "confirm"):  # of lab problems
                assert set(scale.benchmarks.values()) == set(config.data.eval), name
                assert scale.samples == config.eval.num_samples
    assert max(STUDIES["table6"].at("paper").pass_ks) == STUDIES["table6"].at("paper").pass_samples == 256


ABLATIONS: dict[str, dict[str, Any]] = {
    "without-base": {"erasure.base_weight": 0.0},
    "without-gradient": {"erasure.gradient_weight": 0.0},
    "without-extremum": {"erasure.extremum_weight": 0.0},
    "only-base": {"erasure.gradient_weight": 0.0, "erasure.extremum_weight": 0.0},
    "only-gradient": {"erasure.base_weight": 0.0, "erasure.extremum_weight": 0.0},
    "only-extremum": {"erasure.base_weight": 0.0, "erasure.gradient_weight": 0.0},
    "without-penalty": {"erasure.eta": 0.0},
    "without-causal": {"objective.allocation": "sequence"},
    "without-group": {"erasure.baseline": "static"},
    "only-group": {"erasure.eta": 0.0, "objective.allocation": "sequence"},
    "only-causal": {"erasure.eta": 0.0, "erasure.baseline": "static"},
    "only-penalty": {"erasure.baseline": "static", "objective.allocation": "sequence"},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_switches_off_what_it_is_named_for_and_nothing_else(name: str):
    table = read_tables(find_recipe(f"ablations/{name}"))
    assert {f"{s}.{k}": v for s, fields in table.items() for k, v in fields.items()} == ABLATIONS[name]


def test_the_page_of_the_settings_is_fresh():
    assert runpy.run_path(str(PROJECT / "tools" / "paper_page.py"))["main"](["--check"]) == 0


def test_a_user_s_own_settings_are_named_where_the_paper_is_reproduced(tmp_path: Path):
    names = ["table2", "table4", "table5", "erpo-table1"]
    assert [
        d for study, scale in tasks(names, "paper", ["model.path=/m"], out=tmp_path) for d in departures(study, scale)
    ] == []
    [(study, scale)] = tasks(["table1"], "paper", ["train.learning_rate=1e-5"], out=tmp_path)
    [told] = departures(study, scale)
    assert told.startswith("train.learning_rate is 1e-05, not 1e-06: “We use a learning rate of 1e-6")
    assert [departures(study, scale) for study, scale in tasks(["table1"], "lab", out=tmp_path)] == [[]]


MUTATIONS = [
    ("qwen3-4b", "train.learning_rate=1e-5"),
    ("qwen3-4b", "objective.kl_coef=0.4"),
    ("qwen3-4b", "objective.kl_coef=0.0"),
    ("qwen3-4b", "rollout.top_p=0.95"),
    ("qwen3-4b", "rollout.top_k=0"),
    ("qwen3-8b", "rollout.temperature=0.9"),
    ("qwen3-8b", "eval.temperature=0.6"),
    ("qwen3-8b", "eval.top_p=1.0"),
    ("qwen3-8b", "eval.num_samples=16"),
    ("qwen3-8b", "data.eval=['amc23', 'aime24', 'aime25', 'math500', 'minerva', 'olympiadbench']"),
    ("qwen3-8b", "data.max_prompt_length=4096"),
    ("qwen3-8b", "data.train_limit=5100"),
    ("qwen3-8b", "model.path=Qwen/Qwen3-14B"),
    ("qwen3-4b", "train.minibatches=1"),
    ("qwen3-4b", "train.epochs=1.0"),
    ("qwen3-4b", "train.prompts_per_step=16"),
    ("qwen3-4b", "train.warmup_ratio=0.1"),
    ("qwen3-4b", "train.eval_steps=100"),
    ("qwen3-4b", "train.save_steps=0"),
    ("qwen3-4b", "erasure.max_erasures=3"),
    ("qwen3-4b", "rollout.num_generations=16"),
    ("qwen3-4b", "rollout.segment_length=512"),
    ("qwen3-4b", "rollout.max_completion_length=4096"),
    ("qwen3-4b", "erasure.static_baseline=1.0"),
    ("qwen3-4b", "data.chat_template_kwargs={enable_thinking = false}"),
    ("erpo-qwen2.5-3b", "train.prompts_per_step=16"),
    ("erpo-qwen2.5-3b", "train.learning_rate=5e-5"),
    ("erpo-qwen2.5-3b", "model.lora_r=16"),
    ("erpo-qwen2.5-7b", "train.weight_decay=0.01"),
    ("erpo-qwen2.5-7b", "train.lr_scheduler_type=constant"),
    ("erpo-qwen2.5-1.5b", "data.eval=['amc23', 'aime24']"),
    ("erpo-qwen2.5-1.5b", "eval.num_samples=8"),
]


@pytest.mark.parametrize(("recipe", "mutation"), MUTATIONS, ids=lambda v: str(v))
def test_a_changed_number_of_a_recipe_is_noticed(recipe: str, mutation: str):
    found = deviations(_resolved(recipe, settings=(mutation,)), _entries(recipe))
    assert [text.partition(" is ")[0] for text in found] == [mutation.partition("=")[0]]


@pytest.mark.parametrize("method", ["grpo", "dapo", "gspo", "sapo", "erpo"])
def test_an_overlay_that_changes_a_number_is_noticed(method: str, tmp_path: Path):
    overlay = tmp_path / "method.toml"
    overlay.write_text(
        f"{find_recipe(f'methods/{method}').read_text(encoding='utf-8')}\n[train]\nlearning_rate = 2e-6\n"
    )
    changed = load_config(find_recipe("qwen3-4b"), [overlay])
    assert len(deviations(changed, _entries("qwen3-4b"))) == 1
    overlay.write_text(find_recipe(f"methods/{method}").read_text(encoding="utf-8") + "[objective.others]\n")
    changed = load_config(find_recipe("qwen3-4b"), [overlay], ["objective.kl_coef=0.0"])
    assert len(deviations(changed, _entries("qwen3-4b"))) == 1


@pytest.mark.parametrize(
    "mutation",
    ["train.parallel=zero2", "train.workers=8", "train.worker_gpus=0", "rollout.workers=32", "rollout.worker_gpus=0.5"],
)
def test_a_changed_topology_is_noticed(mutation: str):
    config = _resolved("qwen3-8b", "topologies/32xh100", settings=(mutation,))
    found = deviations(config, [*_entries("qwen3-8b"), *stated("topology")])
    assert [text.partition(" is ")[0] for text in found] == [mutation.partition("=")[0]]


def test_dapo_is_what_its_paper_says():
    """Dynamic sampling by accuracy, which drops groups that are all right however long they are, and the overlong penalty."""
    config = _resolved("qwen3-4b", "methods/dapo")
    assert (config.filter.name, config.rewards.overlong, config.rollout.erase) == ("mixed_accuracy", True, False)
    assert {m for m in METHODS if _resolved("qwen3-4b", f"methods/{m}").rewards.overlong} == {"dapo"}


PAPER = json.loads((Path(e3rl_reproduce.__file__).parent / "paper.json").read_text(encoding="utf-8"))
MEANS = json.loads(FILE.read_text(encoding="utf-8"))


def test_tables_have_the_row_and_column_means_of_the_papers():
    assert means(PAPER) == MEANS


def test_means_that_the_paper_gives_follow_from_its_table():
    """ERPO's table 1 has a column of averages: accuracy and boxed rate, in percent."""
    told = {
        ("Qwen2.5-1.5B", "ERPO"): (9.31, 94.32), ("Qwen2.5-3B", "GRPO"): (12.17, 93.93), ("Qwen2.5-3B", "ERPO"): (14.10, 96.51),
        ("Qwen2.5-7B", "SFT"): (6.20, 88.08), ("Qwen2.5-7B", "ERPO"): (20.70, 96.98),
        ("others", "DeepSeek-R1-671B-0528"): (17.48, 23.22),
    }  # fmt: skip
    for (model, row), pair in told.items():
        for metric, percent in zip(("avg@16", "boxed@16"), pair, strict=True):
            assert 100 * MEANS[f"erpo-table1 | {model} | row {row} | {metric}"] == pytest.approx(percent, abs=0.0051)


def _set(*path: str, by: float) -> Callable[[dict[str, Any]], None]:
    def change(tables: dict[str, Any]) -> None:
        place = tables
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = round((place[path[-1]] or 0) + by, 4)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("table1", "Qwen3-4B", "E3RL", "AIME 2024", "avg@32", by=0.001),
        _set("table1", "Qwen3-8B", "DAPO", "Minerva", "pass@32", by=-0.001),
        _set("table2", "Qwen3-4B", "w/o base uncertainty", "AMC 2023", "avg@32", by=0.01),
        _set("table5", "Qwen3-8B", "16x512", "MATH 500", "avg@32", by=0.001),
        _set("table6", "Qwen3-4B", "GSPO", "AIME 2026", "pass@128", by=0.001),
        _set("table7", "Qwen3-4B", "w/o extremum deviation", "AIME 2024", "pass@32", by=0.8),
        _set("erpo-table1", "Qwen2.5-7B", "ERPO", "Minerva", "boxed@16", by=0.0001),
        _set("erpo-table2", "Qwen2.5-1.5B", "GRPO", "AIME25", "pass@8", by=0.0001),
        lambda tables: tables["table3"]["Qwen3-4B"].pop("ow group dynamics"),
        lambda tables: tables["table4"]["Qwen3-8B"].update({"erase@3": tables["table4"]["Qwen3-8B"]["erase@1"]}),
    ],
)
def test_a_changed_table_is_noticed(change: Callable[[dict[str, Any]], None]):
    tables = json.loads(json.dumps(PAPER))
    change(tables)
    assert means(tables) != MEANS
