"""Names of TRL and verl are answered with ours."""

from __future__ import annotations

import dataclasses
import re
import typing

import pytest

from e3rl.cli import main
from e3rl.config import Config, build_config, parse_override
from e3rl.errors import UserError
from e3rl.objectives import OBJECTIVES
from e3rl.objectives import options as options_of
from e3rl.synonyms import SYNONYMS, place_of


@pytest.mark.parametrize("place", sorted(set(SYNONYMS.values())))
def test_every_answer_names_settings_that_there_are(place: str):
    sections = typing.get_type_hints(Config)
    options = {option.name for name in OBJECTIVES for option in options_of(name)} | {"name"}
    named = re.findall(r"([a-z]+)\.(\w+)", place)
    assert named
    for section, field in named:
        known = options if section == "objective" else {f.name for f in dataclasses.fields(sections[section])}
        assert field in known


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"train": {"beta": 0.1}}, "[train] has no key 'beta': it is set as objective.kl_coef"),
        ({"train": {"num_generations": 4}}, "it is set as rollout.num_generations"),
        ({"objective": {"name": "grpo", "epsilon": 0.1}}, "it is set as objective.clip_low and objective.clip_high"),
        ({"train": {"gradient_accumulation_steps": 4}}, "it is set as train.micro_batch_tokens"),
        ({"train": {"learning_rat": 1}}, "Did you mean 'learning_rate'?"),
    ],
)
def test_a_setting_of_another_library_is_answered_with_ours(tables: dict, words: str):
    with pytest.raises(UserError, match=re.escape(words)):
        build_config(tables)


def test_an_override_without_its_section_is_answered():
    with pytest.raises(UserError, match=r"it is set as train\.learning_rate=1e-6"):
        parse_override("learning_rate=1e-6")


def test_an_option_of_another_library_is_answered(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["train", "demo", "--learning_rate", "1e-6", "--per-device-train-batch-size=4", "--nonsense"])
    error = capsys.readouterr().err
    assert "--learning_rate is set as train.learning_rate=VALUE" in error
    assert "--per-device-train-batch-size is set as train.prompts_per_step" in error
    assert "--nonsense is" not in error


def test_options_of_objectives_are_ours_to_name():
    assert build_config({"objective": {"name": "grpo", "kl_coef": 0.1}}).objective.options == {"kl_coef": 0.1}
    assert place_of("reward_nonsense", Config) == ""
