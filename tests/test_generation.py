"""The library's one call on a model that is loaded already."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from e3rl.config import Config, load_config
from e3rl.errors import UserError
from e3rl.generation import generate
from e3rl.lab.pretrain import build_model
from e3rl.lab.tokenizer import build_tokenizer
from e3rl.rollout.companions import save_companions
from e3rl.rollout.moments import Distribution
from e3rl.rollout.statistics import CalibrationStatistics, measured_by

SETTINGS = ["rollout.segment_length=5", "rollout.max_segments=3", "erasure.max_erasures=2"]


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(None, overrides=SETTINGS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    """A random model with statistics by which every first candidate is above its threshold."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(128)
    torch.manual_seed(0)
    build_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    usual = Distribution.of([0.1, 0.1])
    measured = measured_by(config.rollout, config.erasure)
    save_companions(path, config, CalibrationStatistics(measured, (usual,), usual.moments))
    return path


def test_a_loaded_model_decodes_as_its_directory_does(directory: Path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    (by_path,), (by_model,) = generate(str(directory), "1+1"), generate(model, "1+1", tokenizer=tokenizer)
    assert by_model[0].trajectory == by_path[0].trajectory
    assert by_model[0].trajectory.segment_lengths[0] == 5  # the settings beside the model
    assert by_model[0].erased >= 2  # and its statistics


def test_a_model_made_in_memory_decodes_with_siblings(directory: Path, config: Config):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    torch.manual_seed(0)
    made = build_model(tokenizer)
    config = replace(config, erasure=replace(config.erasure, kappa0=-1.0))
    (group,) = generate(made, "1+1", tokenizer=tokenizer, samples=3, config=config)
    assert len({g.text for g in group}) == 3
    assert sum(g.erased for g in group) > 0
    with pytest.raises(UserError, match="e3rl calibrate"):
        generate(made, "1+1", tokenizer=tokenizer, config=config)


def test_a_loaded_model_needs_its_tokenizer(directory: Path):
    with pytest.raises(UserError, match="tokenizer=tokenizer"):
        generate(AutoModelForCausalLM.from_pretrained(directory), "1+1")
