"""The migration pages name settings that exist, here and in TRL."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from e3rl.config import Config
from e3rl.objectives import OBJECTIVES

DOCS = Path(__file__).parents[2] / "docs"
SECTIONS = typing.get_type_hints(Config)
THEIRS = {"data.train_files", "data.val_files", "data.prompt_key", "data.train_batch_size", "data.max_response_length"}


@pytest.mark.parametrize("page", ["serve.md", "from-trl.md", "from-verl-openrlhf.md"])
def test_settings_named_in_the_docs_exist(page: str):
    text = (DOCS / page).read_text(encoding="utf-8")
    named = (
        set(re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_0-9]+)\b", text)) - THEIRS - {"reward_model.ground_truth"}
    )
    assert named
    for setting in named:
        section, field = setting.split(".")
        assert field in {f.name for f in dataclasses.fields(SECTIONS[section])}, setting


@pytest.mark.parametrize("page", ["from-trl.md", "from-verl-openrlhf.md"])
def test_objectives_named_in_the_docs_exist(page: str):
    text = (DOCS / page).read_text(encoding="utf-8")
    named = set(re.findall(r"objective `(\w+)`", text))
    assert named
    assert named <= OBJECTIVES.keys()
