"""Models that the slot cache can't serve exactly are refused, by what they are or by their numbers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers

from e3rl.engine.torch.cache import cache_argument
from e3rl.engine.torch.engine import TorchEngine
from e3rl.engine.torch.fused import FusedSlotModel
from e3rl.engine.torch.model import check_exactness, require_servable
from e3rl.errors import UserError
from tests.engine.models import ARCHITECTURES, SLIDING, build, page_model, sliding, tiny


def t5() -> Any:
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def flash() -> Any:
    model = build("Llama")
    model.config._attn_implementation = "flash_attention_2"  # its package need not be installed for a refusal
    return model


def prompt_tuned() -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(build("Llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_full_attention_models_are_served(name, attention):
    require_servable(tiny(name, attention))
    check_exactness(tiny(name, attention))


@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_with_windows_are_served(name, attention):
    require_servable(sliding(name, attention))
    check_exactness(sliding(name, attention))


@pytest.mark.parametrize("name", ["Gemma3", "Mistral"])
def test_a_window_that_is_wrongly_kept_is_refused_with_numbers(name, monkeypatch):
    """However wide the model's own window is: the check narrows it, and puts it back."""
    model = build(name, head_dim=8, sliding_window=100)
    monkeypatch.setattr("e3rl.engine.torch.cache.sliding_window", lambda model: 5)
    with pytest.raises(UserError, match=r"differ by up to \d"):
        check_exactness(model)
    assert model.config.sliding_window == 100


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: page_model("rwkv"), "a recurrent state of its own"),
        (lambda: page_model("llama4_text"), "layers of type chunked_attention"),
        (t5, "encoder-decoder"),
        (flash, "sdpa"),
        (lambda: build("Llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic"),
        (prompt_tuned, "virtual tokens"),
    ],
    ids=["recurrent", "chunked", "encoder-decoder", "flash", "dynamic rope", "prompt tuning"],
)
def test_models_that_say_so_are_refused(make, reason):
    with pytest.raises(UserError, match=reason):
        require_servable(make())


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_ignores_what_it_is_given_is_refused_with_numbers(ignored, monkeypatch):
    model = build("Llama")
    forward, cache = model.forward, cache_argument(model)

    @functools.wraps(forward)
    def forgetful(**given: Any) -> Any:
        if given.get(cache) is not None and given["input_ids"].shape[1] == 1:
            given[ignored] = torch.ones_like(given[ignored]) if ignored == "attention_mask" else given[ignored] * 0
        return forward(**given)

    monkeypatch.setattr(model, "forward", forgetful)
    with pytest.raises(UserError, match=r"differ by up to \d"):
        TorchEngine(model, eos_ids=(0,), max_rows=1, cache_rows=1, max_length=16)


def test_a_model_that_chokes_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(FusedSlotModel, "decode", lambda *args: 1 / 0)
    with pytest.raises(UserError, match="ZeroDivisionError"):
        check_exactness(tiny("Llama"))


def test_a_model_with_nan_weights_is_refused():
    model = build("Llama")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(UserError, match="nan"):
        check_exactness(model)


def test_check_leaves_no_trace_in_the_model():
    model = build("Qwen3").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_exactness(model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["Phi3", "SmolLM3", "Olmo2", "GPTNeoX", "Granite", "Mixtral"])
def test_other_full_attention_architectures_pass_the_numeric_check(name):
    model = build(name)
    require_servable(model)
    check_exactness(model)
