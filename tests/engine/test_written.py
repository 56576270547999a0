"""The tensors that are sent to another engine are those that a directory for it would hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from e3rl.weights.model import write_model, written_tensors
from tests.engine.models import build


def with_adapters() -> Any:
    return peft.get_peft_model(
        build("Llama"), peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )


MODELS = {
    "tied": lambda: build("Qwen3", head_dim=8, tie_word_embeddings=True),
    "not tied": lambda: build("Qwen3", head_dim=8, tie_word_embeddings=False),
    "experts, which files have one by one": lambda: build(
        "Qwen3Moe", num_experts=4, moe_intermediate_size=16, head_dim=8
    ),
    "adapters, merged": with_adapters,
}


@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS.keys())
def test_what_is_sent_is_what_would_be_written(made: Any, tmp_path: Path):
    model = made()
    write_model(model, tmp_path)
    written, sent = load_file(tmp_path / "model.safetensors"), written_tensors(model)
    assert sent.keys() == written.keys()
    assert all(torch.equal(sent[name], written[name]) for name in written)
