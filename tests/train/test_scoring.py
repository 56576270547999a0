"""Log-probabilities and entropies of finished sequences, against a plain forward pass of each sequence alone."""

import copy
from typing import Any

import pytest
import torch

from e3rl.engine.torch.model import require_servable
from e3rl.errors import UserError
from e3rl.train import attribution
from e3rl.train.attribution import AttributionSettings
from e3rl.train.packing import TrainSequence
from e3rl.train.scoring import require_scorable, score_sequences
from tests.engine.models import ARCHITECTURES, SLIDING, build, page_model, sliding, tiny


def _sequence(prompt: list[int], response: list[int], masked: int = 0) -> TrainSequence:
    mask_T = torch.arange(len(response)) >= masked
    return TrainSequence(
        tuple(prompt), tuple(response), torch.zeros(len(response), dtype=torch.long), mask_T,
        torch.zeros(len(response)), 0, 0, False,
    )  # fmt: skip


SEQUENCES = [_sequence([2, 3, 4], [5, 6, 7, 8, 9]), _sequence([9], [4]), _sequence([5, 6], [7, 7, 7, 2], masked=2)]


def _alone(model, sequence: TrainSequence, temperature: float):
    ids = torch.tensor([sequence.prompt_ids + sequence.response_ids])
    logp_TV = torch.log_softmax(model(input_ids=ids).logits[0].double() / temperature, -1)
    rows = range(len(sequence.prompt_ids) - 1, ids.shape[1] - 1)
    logprobs = [logp_TV[r, i] for r, i in zip(rows, sequence.response_ids, strict=True)]
    entropies = [-(logp_TV[r].exp() * logp_TV[r]).sum() for r in rows]
    return torch.stack(logprobs).float(), torch.stack(entropies).float()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("temperature", "budget"), [(1.0, 1000), (0.7, 9)])
@torch.no_grad()
def test_scores_equal_a_forward_pass_of_each_sequence_alone(name: str, temperature: float, budget: int):
    model = tiny(name)
    scores = score_sequences(model, SEQUENCES, temperature=temperature, token_budget=budget)
    for sequence, found in zip(SEQUENCES, scores, strict=True):
        logprobs_T, entropies_T = _alone(model, sequence, temperature)
        torch.testing.assert_close(found.logprobs_T, logprobs_T, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.entropies_T, entropies_T, atol=1e-5, rtol=1e-5)
        assert found.shares_T is None


def test_shares_add_up_to_one_over_each_response():
    settings = AttributionSettings(window=3, layers=frozenset({1}))
    for found in score_sequences(tiny("Qwen3"), SEQUENCES, temperature=1, token_budget=99, attribution=settings):
        assert found.shares_T is not None
        torch.testing.assert_close(found.shares_T.sum(), torch.tensor(1.0))
        assert (found.shares_T >= 0).all()


@pytest.mark.parametrize(("name", "settings"), [("Granite", {"logits_scaling": 3.0}), ("Cohere", {"logit_scale": 0.4})])
def test_models_that_scale_their_logits_are_scored(name: str, settings: dict[str, Any]):
    require_scorable(build(name, **settings))


def test_a_model_that_caps_its_attention_scores_is_refused():
    """However little that changes: a random model's scores are small."""
    model = build("Gemma2", None, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=1000.0)
    with pytest.raises(UserError, match="it caps its scores"):
        require_scorable(model)


def test_a_model_that_transforms_its_logits_is_refused():
    model = tiny("Llama")
    require_scorable(model)
    whole = model.forward
    model.forward = lambda **kw: type("Out", (), {"logits": whole(**kw).logits * 0.5})()
    try:
        with pytest.raises(UserError, match="packed sequences get log-probabilities that differ by"):
            require_scorable(model)
    finally:
        del model.forward


@pytest.mark.parametrize("name", SLIDING)
def test_models_with_windows_are_scored(name: str):
    require_scorable(sliding(name))


def test_a_window_that_is_not_respected_is_refused_however_wide_it_is(monkeypatch: pytest.MonkeyPatch):
    model = build("Mistral", sliding_window=100)
    require_scorable(model)
    respected = attribution.attention_behind
    monkeypatch.setattr(attribution, "attention_behind", lambda *states, window, **kw: respected(*states, **kw))
    with pytest.raises(UserError, match="packed sequences get log-probabilities that differ by"):
        require_scorable(model)
    assert model.config.sliding_window == 100


def test_a_model_that_keeps_settings_from_its_attention_is_refused():
    model = build("Llama")
    for layer in model.model.layers:
        attention = layer.self_attn.forward
        layer.self_attn.forward = lambda packed_row, run=attention, **kw: run(**kw)
    with pytest.raises(UserError, match="can't train LlamaForCausalLM: its attention can't be told"):
        require_scorable(model)


@pytest.mark.parametrize(
    ("name", "kind"), [("deepseek_v32", "indexed_attention"), ("llama4_text", "chunked_attention")]
)
def test_layers_that_attend_to_what_an_indexer_picks_are_refused_at_any_length(name: str, kind: str):
    """They pick 2,048 tokens, so that a few tokens show no difference."""
    model = copy.deepcopy(page_model(name))
    model.config.index_topk = 2048
    for check in (require_scorable, require_servable):
        with pytest.raises(UserError, match=f"it has layers of type {kind}"):
            check(model)
