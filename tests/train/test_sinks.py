"""Attention sinks (gpt-oss): a logit a head that takes attention and gives nothing, in packed rows too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from e3rl.models import load_policy
from e3rl.train.attribution import packed_attention
from e3rl.train.packing import PackedRow
from e3rl.train.scoring import require_scorable, score_row
from tests.engine.models import build
from tests.train.packs import sequence
from tests.train.random_lab import lab_config

PROMPT = [3, 4, 5]
RESPONSES = ([6, 7, 8, 9, 10, 11, 12], [6, 7, 8, 20, 21, 22, 23, 24], [6, 7, 30, 31])


@pytest.fixture(scope="module")
def model() -> Any:
    return build(
        "GptOss",
        "eager",
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    )


def _plain(model: Any, response: list[int]) -> torch.Tensor:
    ids_1T = torch.tensor([PROMPT + response])
    logprobs_TV = model(input_ids=ids_1T, use_cache=False).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    return logprobs_TV.gather(-1, ids_1T[0, len(PROMPT) :, None])[:, 0]


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_packed_numbers_and_gradients_are_those_of_plain_passes(model: Any):
    require_scorable(model)
    row = PackedRow.of([sequence(PROMPT, r) for r in RESPONSES], torch.device("cpu"))
    with packed_attention(model):
        packed_ST = score_row(model, row, 1.0).logprobs_ST()
    (packed_ST.square().sum()).backward()
    packed = _gradients(model)
    plain = [_plain(model, r) for r in RESPONSES]
    torch.stack([p.square().sum() for p in plain]).sum().backward()
    expected = _gradients(model)
    for found_T, expected_T in zip(packed_ST, plain, strict=True):
        torch.testing.assert_close(found_T[: len(expected_T)], expected_T, atol=1e-5, rtol=1e-5)
    assert packed.keys() == expected.keys()
    assert any("sinks" in name and gradient.abs().max() > 1e-3 for name, gradient in expected.items())
    for name, gradient in expected.items():
        torch.testing.assert_close(packed[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_sinks_take_part(model: Any):
    row = PackedRow.of([sequence(PROMPT, RESPONSES[0])], torch.device("cpu"))
    with torch.no_grad(), packed_attention(model):
        before = score_row(model, row, 1.0).logprobs_N
        sinks = model.model.layers[1].self_attn.sinks
        sinks += 3
        after = score_row(model, row, 1.0).logprobs_N
        sinks -= 3
    assert (before - after).abs().max() > 1e-2


def test_such_a_model_is_loaded_with_its_own_attention(model: Any, tmp_path: Path):
    """The library refuses it PyTorch's."""
    lab = lab_config(tmp_path).model
    load_policy(lab).tokenizer.save_pretrained(tmp_path / "sinks")
    model.save_pretrained(tmp_path / "sinks")
    loaded = load_policy(dataclasses.replace(lab, path=str(tmp_path / "sinks"))).model
    assert loaded.config._attn_implementation == "eager"
    require_scorable(loaded)
    torch.testing.assert_close(_plain(loaded, RESPONSES[0]), _plain(model, RESPONSES[0]))
