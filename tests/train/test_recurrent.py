"""Layers with recurrent states in training: a packed row gives each sequence the state that it has alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from e3rl.errors import UserError
from e3rl.train.attribution import attribution_layers, packed_attention
from e3rl.train.packing import PackedRow, packed_rows, plan_rows, recurrent_mixers
from e3rl.train.scoring import require_scorable, score_row, score_sequences
from tests.engine.models import VOCAB, build, recurrent
from tests.train.packs import sequence

CPU = torch.device("cpu")
TRAINED = (
    "qwen3_5_text",
    "qwen3_next",
    "bamba",
    "nemotron_h",
    "falcon_h1",
    "olmo_hybrid",
    "lfm2",
    "lfm2_moe",
    "mamba2",
)

_IDS = torch.randint(2, VOCAB, (60,), generator=torch.Generator().manual_seed(4)).tolist()
SEQUENCES = [
    sequence(_IDS[:6], _IDS[6:30]),
    sequence(_IDS[:6], [*_IDS[6:12], *_IDS[30:42]]),
    sequence(_IDS[:6], [*_IDS[6:12], *_IDS[30:33], 2, 3], masked=9, erased=True),
    sequence(_IDS[:6], _IDS[42:43]),
    sequence(_IDS[44:46], _IDS[46:50]),
]


def _alone(model: Any, temperature: float = 1.0) -> list[torch.Tensor]:
    found = []
    for text in SEQUENCES:
        ids_1T, first = torch.tensor([text.prompt_ids + text.response_ids]), len(text.prompt_ids)
        logprobs_TV = (model(input_ids=ids_1T, use_cache=False).logits[0, first - 1 : -1] / temperature).log_softmax(-1)
        found.append(logprobs_TV.gather(-1, ids_1T[0, first:, None])[:, 0])
    return found


@pytest.mark.parametrize("name", TRAINED)
@torch.no_grad()
def test_log_probabilities_are_those_of_plain_passes(name: str):
    model = recurrent(name)
    require_scorable(model)
    found = score_sequences(model, SEQUENCES, temperature=0.7, token_budget=999)
    for scores, expected_T in zip(found, _alone(model, 0.7), strict=True):
        torch.testing.assert_close(scores.logprobs_T, expected_T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen3_5_text", "nemotron_h", "lfm2"])
def test_gradients_are_those_of_plain_passes(name: str, checkpointing: bool):
    model, plain = (copy.deepcopy(recurrent(name)).train() for _ in range(2))
    weights = torch.arange(1, 10) / 10
    if checkpointing:
        model.gradient_checkpointing_enable()
    with packed_attention(model):
        [row] = packed_rows(SEQUENCES, 999, CPU)
        logprobs_ST = score_row(model, row, 1.0).logprobs_ST()
        sum(
            (w * logprobs_T.sum() for w, logprobs_T in zip(weights, logprobs_ST, strict=False)), torch.zeros(())
        ).backward()
    sum(
        (w * logprobs_T.sum() for w, logprobs_T in zip(weights, _alone(plain), strict=False)), torch.zeros(())
    ).backward()
    scale = max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None)
    for (where, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), where
        if p.grad is not None and q.grad is not None:
            assert float((p.grad - q.grad).abs().max()) <= 1e-5 * scale, where


def test_the_model_is_left_as_it_was():
    model = recurrent("qwen3_5_text")
    mixers = recurrent_mixers(model)
    assert len(mixers) == 3
    with packed_attention(model), packed_attention(model):
        assert all("forward" in vars(mixer) for mixer in mixers)
    assert not any("forward" in vars(mixer) for mixer in mixers)
    assert recurrent_mixers(build("Qwen3")) == []


def test_a_state_that_goes_on_from_another_branch_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("e3rl.train.attribution.recurrent_mixers", lambda model: [])
    for name in ("qwen3_5_text", "bamba", "lfm2"):
        with pytest.raises(UserError, match="packed sequences get log-probabilities that differ by"):
            require_scorable(recurrent(name))


def test_attribution_is_over_the_layers_that_attend():
    assert attribution_layers(recurrent("qwen3_5_text"), "all") == frozenset({3})
    assert attribution_layers(recurrent("lfm2"), "all") == frozenset({1, 3})
    assert attribution_layers(recurrent("nemotron_h"), "last") == frozenset({1})
    assert attribution_layers(recurrent("falcon_h1"), "last") == frozenset({3})
    with pytest.raises(
        UserError, match=r"Mamba2ForCausalLM has no attention layers.* objective\.allocation = 'sequence'"
    ):
        attribution_layers(recurrent("mamba2"), "last")


def test_rows_are_counted_with_what_each_sequence_repeats():
    """Two siblings of 2 and 3 tokens behind a prompt of 2: 7 tokens in a row, 9 through a recurrent layer."""
    parts = [[sequence([2, 3], [4, 5])], [sequence([2, 3], [6, 7, 8])]]
    assert plan_rows(parts, 9, whole=True) == [[0, 1]]
    assert plan_rows(parts, 8, whole=True) == [[0], [1]]
    assert plan_rows(parts, 7) == [[0, 1]]
    rows = packed_rows([s for part in parts for s in part], 8, CPU, whole=True)
    assert [len(row.ids_N) for row in rows] == [4, 5]
    assert isinstance(rows[0], PackedRow)
