"""The lab's model with random weights and its tokenizer: whole runs in seconds, whatever the embedded weights are."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from e3rl.config import Config, load_config
from e3rl.lab.pretrain import CONTEXT, build_model
from e3rl.lab.tokenizer import build_tokenizer

RECIPE = """
[data]
train = "lab:chain:1"
train_limit = 8
[rollout]
num_generations = 2
segment_length = 4
max_segments = 2
max_rows = 16
[rewards]
functions = ["lab"]
[train]
steps = 2
prompts_per_step = 2
learning_rate = 1e-3
eval_steps = 0
[eval]
limit = 1
num_samples = 2
"""


@functools.cache
def random_lab() -> str:
    """A directory with the model, made once."""
    directory = tempfile.mkdtemp(prefix="random-lab-")
    tokenizer = build_tokenizer(CONTEXT)
    torch.manual_seed(0)
    build_model(tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@functools.cache
def random_hybrid() -> str:
    """The same with a Qwen3.5 of two layers: a gated delta net, and attention."""
    directory = tempfile.mkdtemp(prefix="random-hybrid-")
    tokenizer = build_tokenizer(CONTEXT)
    config = Qwen3_5TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        initializer_range=0.1,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = Qwen3_5ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=config.eos_token_id)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def lab_config(tmp_path: Path, *overrides: str) -> Config:
    """A small run of it."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    return load_config(recipe, [], [f"run.output_dir={tmp_path}", f"model.path={random_lab()}", *overrides])
