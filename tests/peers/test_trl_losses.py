"""Agreement with TRL's trainers by value: same model, ids, masks, advantages, old and reference log-probabilities.

TRL pins its own dependencies, so this runs in an environment of its own (`make test-peers`) and is skipped elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="TRL is not installed here; `make test-peers` installs it in its own environment")

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head, nanstd

from e3rl.config import ObjectiveConfig
from e3rl.equations.erpo import group_advantages
from e3rl.objectives import build
from e3rl.objectives.base import GroupSignals, Objective, Totals, TrainBatch

VOCABULARY, PROMPT, COMPLETION, GROUPS, SIBLINGS = 32, 4, 9, 2, 4
SEQUENCES = GROUPS * SIBLINGS
NEAR, FAR = 0.02, 0.6  # spread of log pi - log pi_old: inside the clip range almost everywhere, and mostly outside it

GRPO = {"average": "sequence"}
CASES = {  # our objective and its options, TRL's settings
    "grpo": ("grpo", GRPO, {"loss_type": "grpo"}),
    "grpo token mean": ("grpo", {}, {"loss_type": "bnpo"}),
    "dr_grpo": ("dr_grpo", {}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": ("dapo", {}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo, dual clip": ("dapo", {"ratio_cap": 1.5, "clip_high": 0.2}, {"loss_type": "dapo", "delta": 1.5}),
    "dapo, KL times ratio": (
        "dapo",
        {"kl_ratio": True, "clip_high": 0.2},
        {"loss_type": "dapo", "use_bias_correction_kl": True},
    ),
    "gspo": (
        "gspo",
        {},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "sapo": ("sapo", {}, {"loss_type": "sapo"}),
    "cispo": ("cispo", {"ratio_cap": 1.3}, {"loss_type": "cispo", "epsilon_high": 1.3}),
    "luspo": (
        "luspo",
        {},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "vespo": ("vespo", {}, {"loss_type": "vespo"}),
}
BY_RESPONSE = ("gspo", "luspo")


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[dict[str, tuple[float, float]]]:
    """Largest differences of every comparison, printed at the end (pytest -s)."""
    rows: dict[str, tuple[float, float]] = {}
    yield rows
    print("\n\n| loss | largest difference of the loss | largest relative difference of a gradient |\n|---|---|---|")
    for name, (loss, gradient) in rows.items():
        print(f"| {name} | {loss:.1e} | {gradient:.1e} |")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.5, **shape)).float()


def small(directory: str) -> dict[str, Any]:
    """Settings of both trainers."""
    batch = {"num_generations": SIBLINGS, "per_device_train_batch_size": SEQUENCES, "max_completion_length": COMPLETION}
    return {"output_dir": directory, "use_cpu": True, "bf16": False, "report_to": [], **batch}


def around(model: LlamaForCausalLM) -> dict[str, Any]:
    """What both trainers are made of beside their settings."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w1"
    )
    return {
        "model": model,
        "reward_funcs": lambda completions, **_: [0.0] * len(completions),
        "train_dataset": Dataset.from_list([{"prompt": "w2"}]),
        "processing_class": tokenizer,
    }


def make_trainer(model: LlamaForCausalLM, directory: str, kl_coef: float, settings: dict) -> GRPOTrainer:
    """A real trainer. Its KL weight is set afterwards, or it would load a reference model from the policy's path."""
    # the papers' k3 term has no ratio before it; see docs/objectives.md
    arguments = GRPOConfig(**small(directory), **{"use_bias_correction_kl": False, **settings})
    trainer = GRPOTrainer(args=arguments, **around(model))
    trainer.beta = kl_coef
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def make_inputs(model: LlamaForCausalLM, drift: float) -> dict[str, Tensor]:
    """Ragged responses, and policies that lie ``drift`` to either side of the model."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (SEQUENCES, PROMPT + COMPLETION), generator=generator)
    mask_ST = (torch.arange(COMPLETION) < LENGTHS_S[:, None]).long()
    with torch.no_grad():
        current_ST = completion_logprobs(model, ids, mask_ST)
    noise = torch.randn(2, SEQUENCES, COMPLETION, generator=generator)
    return {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": torch.ones(SEQUENCES, PROMPT, dtype=torch.long),
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": mask_ST,
        "old_per_token_logps": current_ST - drift * noise[0],
        "ref_per_token_logps": current_ST - drift * noise[1],
        "num_items_in_batch": mask_ST.sum(),
    }


def completion_logprobs(model: LlamaForCausalLM, ids: Tensor, mask_ST: Tensor) -> Tensor:
    attention = torch.cat([torch.ones(SEQUENCES, PROMPT, dtype=torch.long), mask_ST], 1)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, PROMPT - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[:, PROMPT:, None]).squeeze(-1)


LENGTHS_S = torch.tensor([9, 5, 7, 1, 3, 9, 8, 2])
REWARDS_S = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.25, 1.0, -0.5, 0.0])


def our_advantages(objective: Objective, inputs: dict[str, Tensor]) -> Tensor:
    mask_ST = inputs["completion_mask"].bool()
    old_ST, segments_ST = inputs["old_per_token_logps"], torch.zeros_like(inputs["completion_mask"]).where(mask_ST, -1)
    reference_ST = inputs["ref_per_token_logps"]
    groups = [slice(g, g + SIBLINGS) for g in range(0, SEQUENCES, SIBLINGS)]
    return torch.cat(
        [
            objective.advantages(
                GroupSignals(REWARDS_S[g], mask_ST[g], segments_ST[g], -old_ST[g], old_ST[g], reference_ST[g], None)
            )
            for g in groups
        ]
    )


def our_batch(model: LlamaForCausalLM, inputs: dict[str, Tensor], advantages_ST: Tensor) -> TrainBatch:
    mask_ST = inputs["completion_mask"].bool()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    return TrainBatch(
        logprobs_ST=completion_logprobs(model, ids, inputs["completion_mask"]),
        old_logprobs_ST=inputs["old_per_token_logps"],
        reference_logprobs_ST=inputs["ref_per_token_logps"],
        advantages_ST=advantages_ST,
        mask_ST=mask_ST,
        segments_ST=torch.zeros_like(inputs["completion_mask"]).where(mask_ST, -1),
        group_sizes_S=torch.full((SEQUENCES,), SIBLINGS),
        erased_S=torch.zeros(SEQUENCES, dtype=torch.bool),
        totals=Totals(GROUPS, SEQUENCES, int(mask_ST.sum()), COMPLETION),
    )


@pytest.mark.parametrize("drift", [NEAR, FAR], ids=["near", "far"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.04], ids=["no-kl", "kl"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_trl(
    case: str, kl_coef: float, drift: float, model: LlamaForCausalLM, table: dict, tmp_path
) -> None:
    name, options, settings = CASES[case]
    objective = build(ObjectiveConfig(name, {**options, "kl_coef": kl_coef}))
    trainer = make_trainer(model, str(tmp_path), kl_coef, settings)
    model.train()
    inputs = make_inputs(model, drift)
    advantages_ST = our_advantages(objective, inputs)
    parameters = list(model.parameters())

    theirs = trainer._compute_loss(model, {**inputs, "advantages": advantages_ST[:, 0]})
    their_gradients = torch.autograd.grad(theirs, parameters)
    ours = objective.loss(our_batch(model, inputs, advantages_ST))
    our_gradients = torch.autograd.grad(ours.value, parameters)

    clip = ours.metrics.get("clip_fraction")
    if clip is not None:
        their_share = trainer._metrics["train"]["clip_ratio/region_mean"][-1]
        assert (clip[0] > 0) == (drift == FAR or name in BY_RESPONSE), "the case must exercise what it is named for"
        if name not in BY_RESPONSE:  # TRL averages over sequences there, and we over tokens
            assert clip[0] / clip[1] == pytest.approx(their_share, abs=1e-6)
            for side in ("low", "high"):
                total, count = ours.metrics[f"clip_{side}"]
                theirs_here = trainer._metrics["train"][f"clip_ratio/{side}_mean"][-1]
                assert total / count == pytest.approx(theirs_here, abs=1e-6)
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(our_gradients, their_gradients, strict=True))
    difference = abs(float(ours.value.detach() - theirs.detach()))
    table[f"{case}, {'KL' if kl_coef else 'no KL'}, {'far' if drift == FAR else 'near'}"] = (difference, worst)
    assert difference < 1e-5
    assert worst < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_cut_off_responses_are_masked_as_trl_masks_them(
    case: str, model: LlamaForCausalLM, table: dict, tmp_path
) -> None:
    """TRL's mask_truncated_completions: out of the loss and of the tokens that it is a mean over, not out of the advantages."""
    name, options, settings = CASES[case]
    objective = build(ObjectiveConfig(name, {**options, "kl_coef": 0.04}))
    trainer = make_trainer(model, str(tmp_path), 0.04, settings)
    model.train()
    inputs, parameters = make_inputs(model, NEAR), list(model.parameters())
    advantages_ST = our_advantages(objective, inputs)
    learnt_ST = inputs["completion_mask"].clone()
    learnt_ST[[1, 5]] = 0
    masked = {**inputs, "completion_mask": learnt_ST, "num_items_in_batch": learnt_ST.sum()}

    theirs = trainer._compute_loss(model, {**masked, "advantages": advantages_ST[:, 0]})
    their_gradients = torch.autograd.grad(theirs, parameters)
    batch = our_batch(model, inputs, advantages_ST)
    kept = replace(batch, mask_ST=learnt_ST.bool(), totals=replace(batch.totals, tokens=int(learnt_ST.sum())))
    ours = objective.loss(kept).value
    our_gradients = torch.autograd.grad(ours, parameters)

    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(our_gradients, their_gradients, strict=True))
    difference = abs(float(ours.detach() - theirs.detach()))
    table[f"{case}, cut-off responses masked"] = (difference, worst)
    assert difference < 1e-5
    assert worst < 1e-5


def moved(model: LlamaForCausalLM, seed: int, by: float) -> LlamaForCausalLM:
    """Another model whose weights lie ``by`` standard normal draws from the model's, with TRL's head that gives log-probs."""
    generator, other = torch.Generator().manual_seed(seed), LlamaForCausalLM(model.config).float()
    other.load_state_dict(model.state_dict())
    add_fused_lm_head(other, outputs=("log_probs", "entropy"))
    with torch.no_grad():
        for p in other.parameters():
            p += by * torch.randn(p.shape, generator=generator)
    return other


@pytest.mark.parametrize(("name", "by"), [("near", 3e-4), ("far", 0.05)])
@pytest.mark.parametrize("kl_coef", [0.0, 0.05], ids=["no-kl", "kl"])
def test_rloo_equals_trl(
    kl_coef: float, name: str, by: float, model: LlamaForCausalLM, table: dict, tmp_path, monkeypatch
) -> None:
    """TRL's own way from rewards to the loss: KL in the reward, baseline, advantages, clipped loss, gradients."""
    old, reference, model = moved(model, 1, by).train(), moved(model, 2, 0.1), moved(model, 3, 0.0).train()
    trainer = RLOOTrainer(args=RLOOConfig(**small(str(tmp_path)), beta=0.0), **around(old))
    trainer.beta, trainer.ref_model = kl_coef, reference
    inputs = make_inputs(model, NEAR)
    mask_ST, prompts = inputs["completion_mask"], inputs["prompt_ids"]
    responses = [ids[:n].tolist() for ids, n in zip(inputs["completion_ids"], LENGTHS_S, strict=True)]
    monkeypatch.setattr(trainer, "_generate", lambda _: (prompts.tolist(), responses, [""] * SEQUENCES))
    monkeypatch.setattr(trainer, "_calculate_rewards", lambda *_: REWARDS_S[:, None])
    made = trainer._generate_and_score_completions([{"prompt": "w2"}] * SEQUENCES)

    objective = build(ObjectiveConfig("rloo", {"kl_coef": kl_coef}))
    ids = torch.cat([prompts, inputs["completion_ids"]], 1)
    with torch.no_grad():
        inputs["old_per_token_logps"] = completion_logprobs(old, ids, mask_ST)
        inputs["ref_per_token_logps"] = completion_logprobs(reference, ids, mask_ST)
    advantages_ST = our_advantages(objective, inputs)
    torch.testing.assert_close(advantages_ST[:, 0], made["advantages"])

    parameters = list(model.parameters())
    theirs = trainer._compute_loss(model, made)
    their_gradients = torch.autograd.grad(theirs, parameters)
    ours = objective.loss(our_batch(model, inputs, advantages_ST))
    our_gradients = torch.autograd.grad(ours.value, parameters)
    for side in ("low", "high"):
        assert (ours.metrics[f"clip_{side}"][0] > 0) == (name == "far"), "the case must exercise what it is named for"
        assert (trainer._metrics["train"][f"clip_ratio/{side}_mean"][-1] > 0) == (name == "far")
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(our_gradients, their_gradients, strict=True))
    value, their_value = float(ours.value.detach()), float(theirs.detach())
    # ratios of whole responses may be large; near, advantages of about 1 all but cancel each other
    difference = abs(value - their_value) / max(1.0, abs(their_value))
    table[f"rloo, {'KL' if kl_coef else 'no KL'}, {name}"] = (difference, worst)
    assert difference < 1e-5
    assert worst < 3e-5  # of products over whole responses


def test_group_advantages_equal_trl() -> None:
    for rewards_G in REWARDS_S.view(GROUPS, SIBLINGS):
        theirs_G = (rewards_G - rewards_G.mean()) / (nanstd(rewards_G) + 1e-4)
        torch.testing.assert_close(group_advantages(rewards_G, 1e-4), theirs_G)
