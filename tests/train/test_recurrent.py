"""Layers with recurrent states in training: a packed row gives each sequence the state that it has alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from e3rl.config import ModelConfig
from e3rl.errors import UserError
from e3rl.models import load_outline, load_policy
from e3rl.train.attribution import attribution_layers, packed_attention
from e3rl.train.listeners import Silent
from e3rl.train.packing import PackedRow, packed_rows, plan_rows, recurrent_mixers
from e3rl.train.run_directory import read_lines
from e3rl.train.scoring import require_scorable, score_row, score_sequences
from e3rl.train.trainer import Trainer
from tests.engine.models import RECURRENT, VOCAB, build, page_model
from tests.train.packs import sequence
from tests.train.random_lab import lab_config, random_hybrid

CPU = torch.device("cpu")
TRAINED = [name for name in RECURRENT if name != "granitemoehybrid"]

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
    model = page_model(name)
    require_scorable(model)
    found = score_sequences(model, SEQUENCES, temperature=0.7, token_budget=999)
    for scores, expected_T in zip(found, _alone(model, 0.7), strict=True):
        torch.testing.assert_close(scores.logprobs_T, expected_T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen3_5_text", "nemotron_h", "lfm2"])
def test_gradients_are_those_of_plain_passes(name: str, checkpointing: bool):
    model, plain = (copy.deepcopy(page_model(name)).train() for _ in range(2))
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
    model = page_model("qwen3_5_text")
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
            require_scorable(page_model(name))


def test_attribution_is_over_the_layers_that_attend():
    assert attribution_layers(page_model("qwen3_5_text"), "all") == frozenset({3})
    assert attribution_layers(page_model("lfm2"), "all") == frozenset({1, 3})
    assert attribution_layers(page_model("nemotron_h"), "last") == frozenset({1})
    assert attribution_layers(page_model("falcon_h1"), "last") == frozenset({3})
    with pytest.raises(
        UserError, match=r"Mamba2ForCausalLM has no attention layers.* objective\.allocation = 'sequence'"
    ):
        attribution_layers(page_model("mamba2"), "last")


def test_rows_are_counted_with_what_each_sequence_repeats():
    """Two siblings of 2 and 3 tokens behind a prompt of 2: 7 tokens in a row, 9 through a recurrent layer."""
    parts = [[sequence([2, 3], [4, 5])], [sequence([2, 3], [6, 7, 8])]]
    assert plan_rows(parts, 9, whole=True) == [[0, 1]]
    assert plan_rows(parts, 8, whole=True) == [[0], [1]]
    assert plan_rows(parts, 7) == [[0, 1]]
    rows = packed_rows([s for part in parts for s in part], 8, CPU, whole=True)
    assert [len(row.ids_N) for row in rows] == [4, 5]
    assert isinstance(rows[0], PackedRow)


def test_a_checkpoint_with_a_vision_tower_is_loaded_as_its_language_model(tmp_path: Path):
    """As Qwen3.5 is published; the context is that of the text."""
    lab = load_policy(ModelConfig(path=random_hybrid(), device="cpu"))
    text = lab.model.config.to_dict() | {"max_position_embeddings": 4096}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen3_5Config(text_config=text, vision_config=vision, eos_token_id=lab.eos_ids[0])
    whole = Qwen3_5ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    lab.tokenizer.save_pretrained(tmp_path)
    found = ModelConfig(path=str(tmp_path), device="cpu")
    policy = load_policy(found)
    assert load_outline(found).context_length == policy.context_length == 4096
    require_scorable(policy.model)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(policy.model(input_ids=ids).logits, whole(input_ids=ids).logits)


def _even(completions: list[Any], **kwargs: Any) -> list[float]:
    """The share of characters with even numbers: something that a random model can learn."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(ord(x) % 2 == 0 for x in text) / max(1, len(text)) for text in texts]


def test_twenty_steps_with_erasing_go_the_same_way_packed_and_alone(tmp_path: Path):
    """A tiny Qwen3.5. Alone: every sequence is a row of its own, erased candidates too."""
    curves = []
    for budget in (16384, 1):
        path = tmp_path / str(budget)
        path.mkdir()
        config = lab_config(
            path,
            f"model.path={random_hybrid()}",
            f"train.micro_batch_tokens={budget}",
            "train.steps=20",
            "train.prompts_per_step=1",
            "train.learning_rate=1e-4",
            "objective.erased=contrast",
            "erasure.kappa0=0.0",
        )
        trainer = Trainer(config, reward_functions=[_even], listeners=[Silent()])
        trainer.train()
        curves.append(read_lines(trainer.run_path / "metrics.jsonl"))
    assert [line["step"] for line in curves[0]] == list(range(1, 21))
    assert sum(line["erased_tokens"] for line in curves[0]) > 100
    assert max(abs(line["loss"]) for line in curves[0]) > 1e-2
    for packed, alone in zip(*curves, strict=True):
        assert packed["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert packed["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        assert packed["reward"] == alone["reward"]
