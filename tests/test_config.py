"""Recipes: what is read, what is refused, and with which words."""

import dataclasses
import json
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.config import Config, ObjectiveConfig, build_config, load_config, parse_override, to_toml
from e3rl.errors import UserError
from e3rl.objectives import left_behind
from e3rl.parsing import parse_json


def test_defaults_survive_a_round_trip_through_toml():
    assert build_config(tomllib.loads(to_toml(Config()))) == Config()


def test_a_recipe_is_overlaid_and_then_overridden(tmp_path: Path):
    recipe, overlay = tmp_path / "base.toml", tmp_path / "overlay.toml"
    recipe.write_text("[train]\nsteps = 3\nlearning_rate = 1e-3\n[objective]\nname = 'grpo'\nkl_coef = 0.1\n")
    overlay.write_text("[train]\nsteps = 5\n[objective]\nkl_coef = 0.2\n")
    config = load_config(recipe, [overlay], ["train.learning_rate=0.5", "run.name=my run", "rollout.erase=false"])
    assert (config.train.steps, config.train.learning_rate, config.run.name) == (5, 0.5, "my run")
    assert config.objective.name == "grpo"
    assert config.objective.options == {"kl_coef": 0.2}
    assert config.rollout.erase is False


def test_another_objective_does_not_inherit_the_options_of_the_one_it_replaces(tmp_path: Path):
    recipe = tmp_path / "base.toml"
    recipe.write_text("[objective]\nname = 'e3rl'\nerased = 'contrast'\n")
    assert load_config(recipe, [], ["objective.kl_coef=0.5"]).objective.options == {
        "erased": "contrast",
        "kl_coef": 0.5,
    }
    changed = load_config(recipe, [], ["objective.kl_coef=0.5", "objective.name=grpo"]).objective
    assert (changed.name, dict(changed.options)) == ("grpo", {"kl_coef": 0.5})


def test_options_that_another_objective_would_have_too_are_not_left_behind_in_silence():
    recipe = {"objective": {"name": "e3rl", "kl_coef": 0.0, "clip_low": 0.2, "allocation": "sequence"}}
    [told] = left_behind(recipe, ObjectiveConfig("grpo"))
    assert told == (
        "objective.kl_coef = 0.0 is the recipe's for e3rl; grpo has 0.04 here. Say objective.kl_coef=0.0 to keep it"
    )
    assert left_behind(recipe, ObjectiveConfig("grpo", {"kl_coef": 0.0})) == []
    assert left_behind(recipe, ObjectiveConfig("e3rl", {"kl_coef": 0.5})) == []  # an override of its own objective
    assert left_behind(recipe, ObjectiveConfig("gspo")) == [  # KL 0 as well, but a narrow clip
        "objective.clip_low = 0.2 is the recipe's for e3rl; gspo has 0.0003 here. Say objective.clip_low=0.2 to keep it"
    ]
    assert left_behind({}, ObjectiveConfig("grpo")) == []


def test_a_recipe_may_hold_options_for_other_objectives(tmp_path: Path):
    recipe, overlay = tmp_path / "base.toml", tmp_path / "overlay.toml"
    recipe.write_text("[objective]\nname = 'e3rl'\nclip_low = 0.1\n[objective.others]\ngspo.kl_coef = 0.3\n")
    overlay.write_text("[objective]\nname = 'gspo'\n")
    assert load_config(recipe).objective.options == {"clip_low": 0.1}
    assert load_config(recipe, [overlay]).objective.options == {"kl_coef": 0.3}
    assert load_config(recipe, [], ["objective.name=gspo", "objective.kl_coef=0.5"]).objective.options == {
        "kl_coef": 0.5
    }
    assert load_config(recipe, [], ["objective.name=sapo"]).objective.options == {}
    assert load_config(recipe, [overlay], ["objective.name=e3rl"]).objective.options == {}
    with pytest.raises(UserError, match=r"objective\.others\.gspo: expected a table"):
        load_config(None, [], ["objective.others={gspo = 3}"])


def test_a_string_is_a_list_of_one_and_an_empty_one_of_none(tmp_path: Path):
    assert load_config(None, [], ["data.eval=aime24"]).data.eval == ("aime24",)
    assert load_config(None, [], ["data.eval=['aime24', 'amc23']"]).data.eval == ("aime24", "amc23")
    recipe = tmp_path / "old.toml"
    recipe.write_text("[data]\neval = ''\n")
    assert load_config(recipe).data.eval == ()


def test_a_table_among_the_settings_survives_a_round_trip():
    config = load_config(None, [], ["data.chat_template_kwargs={enable_thinking = false, tools = ['a']}"])
    assert config.data.chat_template_kwargs == {"enable_thinking": False, "tools": ["a"]}
    assert build_config(tomllib.loads(to_toml(config))) == config
    assert hash(config.data) == hash(Config().data)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rolout.erase=true", ["unknown section 'rolout'", "Did you mean 'rollout'?"]),
        ("rollout.temperatur=1", ["[rollout] unknown key 'temperatur'", "Did you mean 'temperature'?"]),
        ("rollout.temperature=hot", ["rollout.temperature", "expected a number", "'hot'"]),
        ("rollout.num_generations=8.0", ["rollout.num_generations", "a whole number"]),
        ("rollout.num_generations=true", ["rollout.num_generations", "a whole number"]),
        ("rollout.top_p=1.5", ["rollout.top_p = 1.5", "above 0 and at most 1"]),
        ("rollout.top_p=0", ["rollout.top_p", "above 0"]),
        ("rollout.temperature=nan", ["rollout.temperature = nan is out of range"]),
        ("erasure.baseline=groop", ["erasure.baseline", "'group', 'quantile', 'reservation', 'reference', 'static'"]),
        ("train.report_to=['tensorboard', 3]", ["train.report_to", "expected a string, got 3"]),
        ("rewards.weights=[1.0, 2.0]", ["rewards.weights has 2 values for 1 rewards.functions"]),
        ("data.chat_template_kwargs=thinking", ["data.chat_template_kwargs", "a table such as {key = value}"]),
        ("rewards.functions=[]", ["rewards.functions is empty"]),
        ("train.minibatches=99", ["train.minibatches must not exceed"]),
        ("steps=3", ["'steps=3' is no override", "it is set as train.steps=3"]),
        ("train.steps", ["'train.steps' is no override"]),
    ],
)
def test_what_is_wrong_with_a_setting_is_said_with_its_name(override: str, words: list[str]):
    with pytest.raises(UserError) as caught:
        load_config(None, [], [override])
    for word in words:
        assert word in str(caught.value)


def test_a_truncated_entropy_has_no_temperature_of_its_own():
    with pytest.raises(UserError, match=r"so erasure\.entropy_temperature must be 0"):
        load_config(None, [], ["erasure.entropy_distribution=truncated", "erasure.entropy_temperature=1.0"])


def test_errors_in_a_recipe_name_the_file_and_line(tmp_path: Path):
    broken = tmp_path / "broken.toml"
    broken.write_text("[train]\nsteps = \n")
    with pytest.raises(UserError, match=r"broken\.toml is not valid TOML: .*line 2"):
        load_config(broken)
    broken.write_text("[train]\nstep = 3\n")
    with pytest.raises(UserError, match=r"broken\.toml: \[train\] unknown key 'step'. Did you mean 'steps'"):
        load_config(broken)
    with pytest.raises(UserError, match=r"broken\.toml: \[train\] unknown key 'step'"):
        load_config(broken, [], ["train.steps=3"])
    broken.write_text("[train]\nsteps = 3\n")
    with pytest.raises(UserError, match=r"^\[train\] unknown key 'step'"):  # the override's fault, not the file's
        load_config(broken, [], ["train.step=4"])
    with pytest.raises(UserError, match="no such recipe"):
        load_config(tmp_path / "absent.toml")
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="can't be read"):
        load_config(broken)


def test_an_override_is_toml_where_it_can_be_and_text_otherwise():
    assert parse_override("--data.train=my file.jsonl") == {"data": {"train": "my file.jsonl"}}
    assert parse_override("train.report_to=['wandb']") == {"train": {"report_to": ["wandb"]}}


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_any_text_survives_as_a_setting(text: str):
    config = build_config({"data": {"system_prompt": text}})
    assert build_config(tomllib.loads(to_toml(config))).data.system_prompt == text


_INTO = {int: ("2**70", 10**400), float: (float("nan"), float("inf"), -float("inf"), 10**400), str: ("\0", "\udce9")}
"""Values that no computation, file or path takes, by the type of a setting."""


@pytest.mark.parametrize("section", [f.name for f in dataclasses.fields(Config)])
def test_no_setting_takes_what_nothing_can_use(section: str):
    kind = typing.get_type_hints(Config)[section]
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        inner = typing.get_args(hints[f.name])[0] if typing.get_origin(hints[f.name]) is tuple else hints[f.name]
        for value in _INTO.get(inner, ()):
            given = [value] if inner is not hints[f.name] else value
            with pytest.raises(UserError) as caught:
                build_config({section: {f.name: given}})
            assert f"{section}.{f.name}" in str(caught.value)
            assert len(str(caught.value)) < 300


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=4))
def test_no_value_gets_past_the_reader_with_another_error(value: object):
    for section, key in (("train", "steps"), ("rollout", "top_p"), ("rewards", "functions"), ("objective", "name")):
        try:
            build_config({section: {key: value}})
        except UserError:
            continue


@pytest.mark.parametrize("module", ["e3rl", "e3rl.config", "e3rl.types", "e3rl.cli", "e3rl.errors", "e3rl.plugins"])
def test_light_modules_import_no_heavy_library(module: str):
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'rich', 'pyarrow', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a=" + "[" * 100_000, "nested too deeply"),
        ("a=" + "{a=" * 50_000, "nested too deeply"),
        ("[" + "a." * 100 + "a]", "levels deep"),
        ("a." * 100_000 + "a = 1", "hundreds of parts"),
        ("a = " + "9" * 400, "300 digits"),
        ("a = " + "9" * 5000, "not valid TOML"),
        ("a = 0x" + "f" * 5000, "300 digits"),
        ("a = '" + "x" * 2**18 + "'", "at most"),
    ],
)
def test_a_recipe_without_measure_is_a_sentence(tmp_path: Path, text: str, words: str):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 70 + "]" * 70, "levels deep"),
        ("9" * 400, "400 digits"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[1e999]", "1e999 is too large"),
        ('["\\ud800"]', "half of a surrogate pair"),
        ('{"\\udfff": 1}', "half of a surrogate pair"),
        (b'["\xff\xfe"]', "not valid UTF-8"),
        ("[1,", "line 1, column 4"),
    ],
)
def test_json_without_measure_is_a_sentence(text: str | bytes, words: str):
    with pytest.raises(UserError, match=words):
        parse_json(text, "file.json")


def test_json_within_measure_is_read():
    text = '{"a": [1, -2.5e3, null, true, "é \\ud83d\\ude00"], "b": ' + "9" * 300 + "}"
    assert parse_json(text, "f") == json.loads(text)
    assert str(parse_json("[NaN, 1e999]", "f", finite=False)) == "[nan, inf]"


def test_a_recipe_may_be_yaml(tmp_path: Path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "run:\n  name: on\n  seed: 7\ntrain:\n  learning_rate: 1e-6\n  warmup_ratio: .5\n  report_to: [wandb]\n"
        "data:\n  train: 2026-01-01.jsonl\n  chat_template_kwargs: {enable_thinking: False}\n"
        "rewards:\n  functions:\n    - math\n    - my.py:brief\n",
        encoding="utf-8",
    )
    config = load_config(recipe, [], ["train.steps=3"])
    assert (config.run.name, config.run.seed, config.train.learning_rate) == ("on", 7, 1e-6)
    assert (config.train.warmup_ratio, config.train.report_to, config.train.steps) == (0.5, ("wandb",), 3)
    assert config.data.train == "2026-01-01.jsonl"
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
    assert config.rewards.functions == ("math", "my.py:brief")
    (tmp_path / "same.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_config(tmp_path / "same.toml") == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: [1,", "is not valid YAML"),
        ("- a\n- b\n", "holds no sections"),
        ("train: &x {steps: 1}\neval: *x\n", r"anchors \(&, \*\) are not read"),
        ("train: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
        ("train:\n  stepz: 1\n", "Did you mean 'steps'"),
        ("train: " + "[" * 900, "nested|not valid YAML"),
        ("train:\n  steps: 'a'\n", r"train\.steps: expected a whole number"),
    ],
)
def test_yaml_that_is_no_recipe_is_a_sentence(tmp_path: Path, text: str, words: str):
    (tmp_path / "recipe.yml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"recipe.yml.*({words})"):
        load_config(tmp_path / "recipe.yml")
