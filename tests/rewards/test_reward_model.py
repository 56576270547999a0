"""A sequence-classification model as the reward: by value against transformers, batched, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from e3rl.config import RewardsConfig
from e3rl.errors import UserError
from e3rl.lab.tokenizer import build_tokenizer
from e3rl.reward_model import SequenceReward
from e3rl.rewards.batch import Batch
from e3rl.rewards.scorer import Scorer
from e3rl.types import Message
from tests.rewards.build import trajectory

TEXTS = ["A:53", "", "47+5=52;52-8=44;A:44", "x" * 40, "A:5"]


def saved(tmp_path: Path, *, labels: int = 1, template: bool = True, causal: bool = False) -> Path:
    tokens = build_tokenizer(256)
    if not template:
        tokens.chat_template = None
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=96, num_labels=labels, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    made: Any = (Qwen3ForCausalLM if causal else Qwen3ForSequenceClassification)(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4)  # else all scores are nearly equal
    path = tmp_path / f"rm{labels}{template}{causal}"
    made.save_pretrained(path)
    tokens.save_pretrained(path)
    return path


def batch(*prompts: Any) -> Batch:
    chosen = prompts or ("47+5-8+9:",)
    made = [trajectory(chosen[i % len(chosen)], id=f"p{i}") for i in range(len(TEXTS))]
    return Batch(tuple(made), tuple(TEXTS))


def one_by_one(path: Path, made: Batch, label: int, *, template: bool) -> list[float]:
    """Every text alone, by transformers."""
    tokens = build_tokenizer(256)
    model = Qwen3ForSequenceClassification.from_pretrained(path).eval()
    found = []
    for problem, text in zip(made.problems, made.texts, strict=True):
        chat = [{"role": "user", "content": problem.prompt}] if isinstance(problem.prompt, str) else made.prompts[0]
        whole = str(problem.prompt) + text
        if template:
            whole = str(tokens.apply_chat_template([*chat, {"role": "assistant", "content": text}], tokenize=False))
        ids = torch.tensor([tokens.encode(whole, add_special_tokens=False)])
        with torch.no_grad():
            found.append(float(model(input_ids=ids).logits[0, label]))
    return found


@pytest.mark.parametrize("tokens", [1, 120, 16384])
@pytest.mark.parametrize(("labels", "label", "template"), [(1, -1, True), (3, 2, True), (1, 0, False)])
def test_scores_are_the_model_s_own_however_they_are_batched(
    tmp_path: Path, tokens: int, labels: int, label: int, template: bool
):
    path, made = saved(tmp_path, labels=labels, template=template), batch()
    reward = SequenceReward({"path": str(path), "label": label, "batch_tokens": tokens})
    expected = one_by_one(path, made, max(0, label), template=template)
    assert [p.value for p in reward.score(made)] == pytest.approx(expected, abs=1e-5)
    assert len({round(v, 3) for v in expected}) >= 4


def test_a_chat_prompt_keeps_its_turns(tmp_path: Path):
    path, made = saved(tmp_path), batch((Message("system", "Be brief."), Message("user", "47+5:")))
    expected = one_by_one(path, made, 0, template=True)
    assert [p.value for p in SequenceReward({"path": str(path)}).score(made)] == pytest.approx(expected, abs=1e-5)


def test_what_has_no_score_has_no_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = RewardsConfig(functions=("reward_model",), reward_model={"path": str(saved(tmp_path))})
    made = batch("47+5:", "9" * 94 + ":")
    with Scorer(config) as scorer:
        rewards = scorer.score(made.trajectories, made.texts)
        assert [r.value is None for r in rewards] == [False, True, False, True, False]
        assert "100 tokens, and the reward model takes 96" in str(rewards[1].error)
        monkeypatch.setattr(SequenceReward, "_scores", lambda self, sequences: [math.nan] * len(sequences))
        assert "says nan" in str(scorer.score(made.trajectories, made.texts)[0].error)


@pytest.mark.parametrize(
    ("table", "made", "why"),
    [
        ({}, {}, "which model is it"),
        ({"path": "nowhere/at/all"}, {}, "no such directory"),
        ({"label": -1}, {"labels": 3}, "has 3 labels: set rewards.reward_model.label, from 0 to 2"),
        ({"label": 3}, {"labels": 3}, "has 3 labels"),
        ({}, {"causal": True}, "no score.weight: it is no sequence-classification model"),
        ({"size": 3}, {}, "size"),
    ],
)  # fmt: skip
def test_a_model_that_can_not_judge_is_refused(tmp_path: Path, table: dict[str, Any], made: dict[str, Any], why: str):
    named = table if not made else {"path": str(saved(tmp_path, **made)), **table}
    with pytest.raises(UserError, match=why):
        SequenceReward(named)
