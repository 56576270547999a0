"""Mixtures of experts in training: adapters on experts, the loss of routers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from e3rl.config import Config, ModelConfig, ObjectiveConfig, RolloutConfig, TrainConfig
from e3rl.errors import UserError
from e3rl.models import Policy, ReferencePolicy, add_lora
from e3rl.objectives import build
from e3rl.testing.scripts import assert_same_transcript, play, random_script
from e3rl.train.attribution import packed_attention
from e3rl.train.learner import Learner
from e3rl.train.packing import PackedRow, packed_rows
from e3rl.train.scoring import require_scorable, score_row
from e3rl.weights.files import save_pretrained
from tests.engine.models import EOS, VOCAB, page_model
from tests.engine.test_engine import contract, oracle, torch_engine
from tests.train.packs import sequence
from tests.train.rollouts import rewarded_group

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


def _balance(model: Any, ids: list[int]) -> torch.Tensor:
    """The model's own loss of routers over one plain sequence."""
    output = model(input_ids=torch.tensor([ids]), output_router_logits=True, use_cache=False)
    loss: torch.Tensor = output.aux_loss
    return loss


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss"])
def test_the_loss_of_routers_is_the_models_own(name: str, checkpointing: bool):
    """Value and gradient, of a row that is one sequence; nothing where no gradients are taken."""
    model, plain = (copy.deepcopy(page_model(name)).train() for _ in range(2))
    if checkpointing:
        model.gradient_checkpointing_enable()
    row = PackedRow.of([sequence([4, 5, 6], [7, 8, 9, 10, 11])], torch.device("cpu"), routers=True)
    with packed_attention(model):
        found = score_row(model, row, 1.0).router_loss
        assert found is not None
        found.backward()
        with torch.no_grad():
            assert score_row(model, row, 1.0).router_loss is None
    expected = _balance(plain, [4, 5, 6, 7, 8, 9, 10, 11])
    expected.backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    pairs = zip(model.named_parameters(), plain.parameters(), strict=True)
    differences = [
        (where, float((p.grad - q.grad).abs().max()))
        for (where, p), q in pairs
        if p.grad is not None and q.grad is not None
    ]
    assert any("router" in where or "gate.weight" in where for where, _ in differences)
    assert all(difference <= 1e-5 for _, difference in differences), differences


def _learner(weight: float, tokens: int = 16384, name: str = "qwen3_moe") -> Learner:
    config = Config(
        objective=ObjectiveConfig("grpo", {"kl_coef": 0.0}),
        rollout=RolloutConfig(segment_length=4, max_segments=3),
        train=TrainConfig(learning_rate=0.01, warmup_ratio=0.0, router_loss=weight, micro_batch_tokens=tokens),
    )
    model = copy.deepcopy(page_model(name))
    return Learner(Policy(model, None, "tiny", EOS, 256), build(config.objective), config, updates=30)


def test_updates_with_the_loss_of_routers_use_experts_more_evenly():
    groups = [rewarded_group("first", [1.0, 0.0, 1.0], [[4, 2], [4, 4, 1], [3]])]
    losses = {}
    for weight in (0.0, 5.0):
        learner = _learner(weight)
        metrics = [learner.learn(groups, update)[1].means for update in range(6)]
        assert all(("router_loss" in of_step) == (weight > 0) for of_step in metrics)
        ids = [*groups[0].group.prompt.ids, *groups[0].group.trajectories[1].ids.tolist()]
        losses[weight] = float(_balance(learner._policy.model.eval(), ids))
    assert losses[5.0] < losses[0.0] - 0.01


def test_rows_count_by_their_tokens():
    """The same step in one row and in three: a mean over tokens of what each row's routers do."""
    groups = [rewarded_group("first", [1.0, 0.0, 1.0], [[4, 2], [4, 4, 1], [3]])]
    means = _learner(1.0, tokens=1).learn(groups, 0)[1].means
    model, sizes, found = page_model("qwen3_moe"), [], []
    for trajectory in groups[0].group.trajectories:
        sizes.append(len(trajectory.ids))
        found.append(float(_balance(model, [*trajectory.prompt.ids, *trajectory.ids.tolist()])))
    expected = sum(n * loss for n, loss in zip(sizes, found, strict=True)) / sum(sizes)
    assert means["router_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_models_that_define_no_such_loss_are_refused(name: str):
    with pytest.raises(UserError, match=r"train\.router_loss: .* defines no loss of routers"):
        _learner(0.1, name=name)
