"""The library's one call on a model that is loaded already."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import utils as hub
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from e3rl.cli import main
from e3rl.config import Config, RolloutConfig, load_config
from e3rl.errors import UserError
from e3rl.generation import LONGEST, generate, to_the_end
from e3rl.lab import lab_directory
from e3rl.lab.pretrain import build_model
from e3rl.lab.tokenizer import build_tokenizer
from e3rl.rollout.companions import find_companions, save_companions
from e3rl.rollout.moments import Distribution
from e3rl.rollout.statistics import CalibrationStatistics, measured_by
from e3rl.types import Problem, Prompt

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


def test_loading_shows_no_bar_and_leaves_a_script_its_own(directory: Path, capsys: pytest.CaptureFixture[str]):
    shown, downloads = logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    try:
        logging.enable_progress_bar()
        generate(str(directory), "1+1")
        assert "Loading weights" not in capsys.readouterr().err
        assert not hub.are_progress_bars_disabled()
        AutoModelForCausalLM.from_pretrained(directory)
        assert "Loading weights" in capsys.readouterr().err
        logging.disable_progress_bar()
        generate(str(directory), "1+1")
        assert (logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled()) == (False, True)
    finally:
        if shown:
            logging.enable_progress_bar()
        if downloads:
            hub.enable_progress_bars()


def test_a_loaded_model_needs_its_tokenizer(directory: Path):
    with pytest.raises(UserError, match="tokenizer=tokenizer"):
        generate(AutoModelForCausalLM.from_pretrained(directory), "1+1")


@pytest.fixture(scope="module")
def short_settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, saved with settings by which an answer has at most 4 tokens."""
    path = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(lab_directory(), path)
    short = replace(find_companions(str(path)).config().rollout, segment_length=4, max_segments=1)
    save_companions(path, Config(rollout=short), CalibrationStatistics({}))
    return path


def test_an_answer_goes_on_to_its_end_unless_a_length_is_asked_for(short_settings: Path):
    [[whole]] = generate(str(short_settings), "3+4:", erase=False)
    assert whole.trajectory.finish == "stop"
    assert len(whole.trajectory.ids) > 4
    config = find_companions(str(short_settings)).config()
    [[cut]] = generate(str(short_settings), "3+4:", erase=False, config=config)
    assert (cut.trajectory.finish, len(cut.trajectory.ids)) == ("length", 4)
    [[told]] = generate(str(short_settings), "3+4:", erase=False, config=config, whole=True)
    assert told.text == whole.text


def test_decode_says_where_an_answer_was_cut_off(short_settings: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["decode", str(short_settings), "3+4:", "--plain"]) == 0
    assert "cut off" not in capsys.readouterr().out
    assert main(["decode", str(short_settings), "3+4:", "--plain", "rollout.max_segments=1"]) == 0
    assert "\ncut off at 4 tokens\n" in capsys.readouterr().out


def test_a_whole_answer_is_bounded_by_context_and_by_its_settings():
    prompts = [Prompt(Problem("a", "a"), (1,) * 10), Prompt(Problem("b", "b"), (1,) * 30)]
    rollout = RolloutConfig(segment_length=16, max_segments=2, num_generations=3)
    found = to_the_end(rollout, 100, prompts)
    assert (found.completion_limit, found.max_segments, found.max_rows) == (70, 5, 6)
    assert to_the_end(rollout, 10**6, prompts).completion_limit == LONGEST - 30
    assert to_the_end(replace(rollout, max_completion_length=20), 100, prompts).completion_limit == 20
