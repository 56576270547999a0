"""The forward pass written out: for whom it stands in, that it sees new weights, and the layouts of its products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from e3rl.engine.protocol import Sampling
from e3rl.engine.torch.cache import GenericSlotModel
from e3rl.engine.torch.engine import TorchEngine
from e3rl.engine.torch.fused import FusedSlotModel, FusedWeights, fusable
from e3rl.engine.torch.model import slot_model
from e3rl.engine.torch.operations import (
    _LARGE,
    _by_kernel,
    _by_products,
    _Packed,
    _ProjectionInPlace,
    _Stacked,
    project,
)
from e3rl.engine.torch.storage import StepRows
from e3rl.types import Draw
from tests.engine.models import ARCHITECTURES, build, tiny


def generate(engine: TorchEngine, tokens: int = 8) -> tuple[int, ...]:
    [row] = engine.prefill([4, 5, 6], 1)
    engine.extend(row, tokens, Draw(0, 0, "p", 0, 0, 0), Sampling())
    while True:
        for _, candidate in engine.poll():
            engine.release(row)
            return tuple(candidate.ids.tolist())


def engine_of(model) -> TorchEngine:
    return TorchEngine(model, eos_ids=(), max_rows=2, cache_rows=2, max_length=32)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_gives_the_logits_of_the_models_own_forward_pass(name):
    model = tiny(name)
    assert isinstance(slot_model(model, 5, 64), FusedSlotModel)
    results = []
    with torch.inference_mode():
        for served in (slot_model(model, 5, 64), GenericSlotModel(model, 5, 64)):
            logits = [served.prefill([3, 4, 5, 6, 7][: 1 + slot], slot) for slot in range(5)]
            rows = StepRows([9] * 5, [1, 2, 3, 4, 5], served.storage, served.device)
            results.append(torch.stack([*logits, *served.decode(rows)[:5]]))
    assert torch.allclose(*results, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: build("Phi3"), lambda: tiny("Llama", "eager")], ids=["Phi3", "eager"])
def test_other_models_use_their_own(make):
    assert not fusable(make())
    assert isinstance(slot_model(make(), 2, 32), GenericSlotModel)


def test_a_model_that_someone_hooked_into_uses_its_own():
    model = build("Llama")
    assert fusable(model)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *args: None)
    assert not fusable(model)
    handle.remove()
    model.model.layers[0].self_attn.q_proj = nn.Sequential(model.model.layers[0].self_attn.q_proj)
    assert not fusable(model)


def test_biases_are_added():
    model = build("Llama", attention_bias=True, mlp_bias=True)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    engine_of(model)  # compares with a full forward pass
    assert fusable(model)


def test_weights_changed_in_place_are_seen_by_the_next_prompt():
    model, other = build("Qwen3"), build("Qwen3", initializer_range=0.2)
    engine = engine_of(model)
    before = generate(engine)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    assert generate(engine) == generate(engine_of(other)) != before


def test_weights_changed_behind_autograds_back_are_seen_after_load_weights():
    model, other = build("Qwen3"), build("Qwen3", initializer_range=0.2)
    engine = engine_of(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    engine.load_weights(dict(model.named_parameters()), 1)
    assert generate(engine) == generate(engine_of(other))


def test_engines_of_a_model_share_one_arrangement_of_its_weights():
    model = build("Llama")
    assert FusedWeights.of(model) is FusedWeights.of(model)


@pytest.mark.parametrize("bias", [False, True])
def test_every_layout_gives_the_layers_outputs_side_by_side(bias):
    torch.manual_seed(0)
    layers = [nn.Linear(24, size, bias=bias) for size in (8, 4, 4)]
    x_RD = torch.randn(8, 24)
    expected = torch.cat([layer(x_RD) for layer in layers], -1)
    for layout in (_Packed, _Stacked, _ProjectionInPlace):
        with torch.no_grad():
            assert torch.allclose(layout(layers)(x_RD), expected, atol=1e-6)


def test_large_weights_are_laid_out_for_onednn():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    assert isinstance(project([nn.Linear(512, _LARGE // 512)]), _Packed)
    assert isinstance(project([nn.Linear(512, _LARGE // 512 - 1)]), _Stacked)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (9, 3)])
def test_attention_by_products_is_that_of_the_kernel(heads, kv_heads):
    torch.manual_seed(0)
    q, keys, values = torch.randn(5, heads, 16), torch.randn(5, kv_heads, 64, 16), torch.randn(5, kv_heads, 64, 16)
    seen = torch.arange(32) <= torch.tensor([[0], [3], [31], [9], [20]])
    mask = torch.zeros(5, 32).masked_fill_(~seen, -torch.inf)
    given = (q, keys[:, :, :32], values[:, :, :32])
    by_products, by_kernel = (attention(mask, heads, kv_heads, 0.25) for attention in (_by_products, _by_kernel))
    assert torch.allclose(by_products(*given), by_kernel(*given), atol=1e-6)


@pytest.mark.parametrize("dim", [8, 64])
def test_attention_has_the_same_bits_however_far_is_read_and_whoever_is_beside(dim):
    torch.manual_seed(0)
    q, keys, values = torch.randn(16, 4, dim), torch.randn(16, 2, 256, dim), torch.randn(16, 2, 256, dim)
    positions = torch.arange(16) + 10

    def attend(rows: int, width: int) -> torch.Tensor:
        mask = torch.zeros(rows, width).masked_fill_(torch.arange(width) > positions[:rows, None], -torch.inf)
        return _by_products(mask, 4, 2, 0.3)(q[:rows], keys[:rows, :, :width], values[:rows, :, :width])

    expected = attend(16, 32)
    for width in range(32, 257, 32):
        for rows in (4, 8, 16):
            assert torch.equal(attend(rows, width), expected[:rows])
