"""A rehearsal changes sizes and nothing else, and runs the recipe's own commands from training to the exported model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from e3rl.cli import main
from e3rl.cli.recipes import find_recipe
from e3rl.config import Config, load_config
from e3rl.rehearse import rehearsal, standins
from e3rl.rehearse.rehearsal import changed, shrink

PAPER = ("qwen3-4b", "qwen3-8b", "erpo-qwen2.5-1.5b", "erpo-qwen2.5-3b", "erpo-qwen2.5-7b")
METHODS = ("e3rl", "grpo", "dapo", "gspo", "sapo", "erpo", "sft", "vanilla")


def _recipe(name: str, *overlays: str) -> Config:
    return load_config(find_recipe(name), [find_recipe(o) for o in overlays])


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("method", METHODS)
def test_only_sizes_change(name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(standins, "make_model", lambda config, directory: {})
    config = _recipe(name, f"methods/{method}")
    small, _, _ = shrink(config, tmp_path)
    assert set(changed(config, small)) <= set(rehearsal._SIZES)
    assert small.eval.num_samples == config.eval.num_samples


@pytest.mark.parametrize("name", sorted(["Qwen/Qwen3-8B", "Qwen/Qwen2.5-7B"]))
def test_the_architecture_stays(name: str):
    """Type, tied weights, biases and the ratio of heads are the real model's."""
    config = _recipe("qwen3-4b")
    real = standins.architecture(load_config(overrides=[f"model.path={name}"]).model)
    small = standins.shrunk(real)
    assert small["tie_word_embeddings"] is real["tie_word_embeddings"] is False
    ratio = real["num_attention_heads"] // real["num_key_value_heads"]
    assert small["num_attention_heads"] // small["num_key_value_heads"] == min(ratio, standins.HEADS)
    assert {k for k in real if real[k] != small[k]} <= {
        *(
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ),
        *("vocab_size", "max_window_layers", "bos_token_id", "eos_token_id"),
    }
    assert config.model.path == "Qwen/Qwen3-4B"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("Qwen/Qwen3-4B", 4_022_468_096), ("Qwen/Qwen3-8B", 8_190_735_360), ("Qwen/Qwen2.5-3B", 3_085_938_688)],
)
def test_the_shipped_configs_are_those_of_the_real_models(name: str, parameters: int):
    """By the parameters that the published weights have."""
    real = dict(standins.architecture(load_config(overrides=[f"model.path={name}"]).model))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(real.pop("model_type"), **real))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_from_the_command_to_the_exported_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Trained, killed, resumed, evaluated, exported and loaded, by the commands of the user."""
    assert main(["rehearse", "qwen3-4b", "--directory", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for outcome in ("killed (SIGKILL) after step 2", "train, resumed", "export, loaded by transformers"):
        assert outcome in shown
    assert "rollout.segment_length" in shown
    assert "last step: loss" in shown
