"""Mixtures of experts in training: adapters on experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from e3rl.config import ModelConfig
from e3rl.errors import UserError
from e3rl.models import Policy, ReferencePolicy, add_lora, save_pretrained
from e3rl.testing.scripts import assert_same_transcript, play, random_script
from e3rl.train.attribution import packed_attention
from e3rl.train.packing import packed_rows
from e3rl.train.scoring import require_scorable, score_row
from tests.engine.models import EOS, VOCAB, page_model
from tests.engine.test_engine import contract, oracle, torch_engine
from tests.train.packs import sequence

NAMES = ("q_proj", "experts.gate_up_proj", "experts.down_proj")


class _NoTokenizer:
    def save_pretrained(self, directory: Path) -> None:
        pass


def _adapted(name: str) -> Any:
    pytest.importorskip("peft")
    torch.manual_seed(1)
    model = add_lora(copy.deepcopy(page_model(name)), ModelConfig(lora_r=2, lora_target_modules=NAMES))
    with torch.no_grad():
        for where, parameter in model.named_parameters():
            if "lora_B" in where:  # zeros at the beginning: adapters that do nothing
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3"])
def test_adapters_on_experts_decode_and_learn(name: str, tmp_path: Path):
    """The engine serves what is trained, every expert that is chosen gets gradients, and what is saved is the adapted model."""
    model = _adapted(name)
    require_scorable(model)
    script = random_script(3, VOCAB)
    got, expected = (play(make(model), script, contract(model)) for make in (torch_engine, oracle))
    assert_same_transcript(got, expected, 1e-4)
    texts = [sequence([4, 5, 6], [7, 8, 9, 10]), sequence([4, 5, 6], [7, 20, 21])]
    with packed_attention(model.train()):
        [row] = packed_rows(texts, 99, torch.device("cpu"))
        score_row(model, row, 1.0).logprobs_ST().sum().backward()
    trained = {where: p.grad for where, p in model.named_parameters() if p.requires_grad and "experts" in where}
    assert len(trained) >= 8
    assert all(grad is not None and grad.abs().max() > 0 for grad in trained.values())
    model.eval()
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        with ReferencePolicy(model).model() as reference:
            torch.testing.assert_close(reference(input_ids=ids).logits, page_model(name)(input_ids=ids).logits)
        assert (logits - page_model(name)(input_ids=ids).logits).abs().max() > 1e-2
        save_pretrained(Policy(model, _NoTokenizer(), "tiny", EOS, 256), tmp_path, "card")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(input_ids=ids).logits, logits, atol=1e-4, rtol=1e-4)


def test_a_name_that_is_neither_module_nor_parameter_is_refused():
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=r"experts\.nowhere"):
        add_lora(
            copy.deepcopy(page_model("qwen3_moe")), ModelConfig(lora_r=2, lora_target_modules=("experts.nowhere",))
        )
