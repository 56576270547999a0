"""Log-probabilities and entropies in chunks, against the whole matrix; their backward pass against autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from e3rl.config import ModelConfig
from e3rl.engine.torch.operations import LogitTransform
from e3rl.errors import UserError
from e3rl.models import add_lora
from e3rl.train import scoring
from e3rl.train.scoring import head_scores, output_matrix
from tests.engine.models import build


def _case(bias: bool, frozen: bool = False) -> tuple[nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    head = nn.Linear(8, 40, bias=bias)
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_(not frozen)
    hidden_KD = torch.randn(21, 8, generator=generator).requires_grad_()
    return head, hidden_KD, torch.randint(40, (21,), generator=generator), torch.randn(21, generator=generator)


def _plain(head: nn.Linear, hidden_KD: torch.Tensor, ids_K: torch.Tensor, temperature: float):
    logp_KV = (head(hidden_KD) / temperature).log_softmax(-1)
    return logp_KV.gather(1, ids_K[:, None]).squeeze(1), -(logp_KV.exp() * logp_KV).sum(-1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_values_and_gradients_equal_those_of_the_whole_matrix(
    bias: bool, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scoring, "_CHUNK_ELEMENTS", 40 * chunk)
    monkeypatch.setattr(scoring, "_SMALLEST_CHUNK", 1)
    head, hidden_KD, ids_K, weights_K = _case(bias)
    leaves = [hidden_KD, *head.parameters()]
    expected = _plain(head, hidden_KD, ids_K, temperature)
    slopes = torch.autograd.grad((expected[0] * weights_K).sum(), leaves)
    found = head_scores(head, hidden_KD, ids_K, temperature)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(torch.autograd.grad((found[0] * weights_K).sum(), leaves), slopes, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert not found[1].requires_grad


@pytest.mark.parametrize("transform", [LogitTransform(0.25), LogitTransform(1.0, 2.0), LogitTransform(3.0, 1.5)])
def test_scaled_and_capped_logits_are_learnt_from(transform: LogitTransform):
    """As Granite, Cohere and Gemma have them; the cap cuts deep into these logits."""
    head, hidden_KD, ids_K, weights_K = _case(bias=True)
    leaves = [hidden_KD, *head.parameters()]
    logits_KV = head(hidden_KD) * transform.scale
    if transform.cap is not None:
        assert logits_KV.abs().max() > transform.cap
        logits_KV = transform.cap * torch.tanh(logits_KV / transform.cap)
    logprobs_KV = (logits_KV / 0.6).log_softmax(-1)
    expected_K = logprobs_KV.gather(-1, ids_K[:, None])[:, 0]
    slopes = torch.autograd.grad((expected_K * weights_K).sum(), leaves, retain_graph=True)
    found = head_scores(head, hidden_KD, ids_K, 0.6, transform)
    torch.testing.assert_close(found[0], expected_K, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], -(logprobs_KV.exp() * logprobs_KV).sum(-1), atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(torch.autograd.grad((found[0] * weights_K).sum(), leaves), slopes, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_frozen_matrix_gets_no_gradient():
    head, hidden_KD, ids_K, _ = _case(bias=True, frozen=True)
    head_scores(head, hidden_KD, ids_K, 1.0)[0].sum().backward()
    assert head.weight.grad is None
    assert head.bias.grad is None
    assert hidden_KD.grad is not None


def test_certain_and_impossible_tokens_stay_finite():
    head = nn.Linear(1, 3, bias=False)
    head.weight.data = torch.tensor([[200.0], [0.0], [-200.0]])
    logprobs_K, entropies_K = head_scores(head, torch.ones(3, 1), torch.tensor([0, 1, 2]), 1.0)
    assert logprobs_K.tolist() == [0.0, -200.0, -400.0]
    assert entropies_K.tolist() == [0.0, 0.0, 0.0]


def test_an_adapted_output_matrix_is_refused():
    model = add_lora(build("Llama"), ModelConfig(lora_r=2, lora_target_modules=("lm_head",)))
    with pytest.raises(UserError, match="is a Linear: e3rl trains through a plain one"):
        output_matrix(model.get_base_model())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("q_proj", "v_proj"), {"q_proj", "v_proj"}),
        (("o_proj",), {"o_proj"}),
        ((r".*\.(up|down)_proj",), {"up_proj", "down_proj"}),
        ((), {"q_proj", "v_proj"}),  # PEFT's own choice for Llama
        (("all-linear",), {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_adapters_go_where_the_setting_says(names: tuple[str, ...], expected: set[str]):
    model = add_lora(build("Llama"), ModelConfig(lora_r=2, lora_target_modules=names))
    adapted = {n.split(".lora_A")[0].rpartition(".")[2] for n, _ in model.named_parameters() if ".lora_A" in n}
    assert adapted == expected


def test_adapters_that_go_nowhere_are_said():
    with pytest.raises(UserError, match=r"model.lora_target_modules = \['nowhere'\]"):
        add_lora(build("Llama"), ModelConfig(lora_r=2, lora_target_modules=("nowhere",)))
