"""Erasable rollouts inside TRL's own GRPOTrainer: its loss, rewards and data unchanged, our completions.

TRL pins its own dependencies, so this runs in an environment of its own (`make test-peers`) and is skipped elsewhere.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed here; `make test-peers` installs it in its own environment")

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, RLOOConfig
from trl.scripts.grpo import GRPOScriptArguments
from trl.scripts.rloo import RLOOScriptArguments

from e3rl.cli.recipes import find_recipe
from e3rl.config import Config, ErasureConfig, RolloutConfig, load_config
from e3rl.errors import UserError
from e3rl.integrations import trl_recipe
from e3rl.integrations.trl import erasable_rollout
from e3rl.integrations.trl_arguments import Arguments
from e3rl.integrations.trl_losses import reason_for
from e3rl.integrations.trl_recipe import translate
from e3rl.lab.pretrain import build_model
from e3rl.lab.problems import generate
from e3rl.lab.reward import lab_reward
from e3rl.lab.tokenizer import build_tokenizer
from e3rl.models import resolve_model_path
from e3rl.rollout.orders import Event, Finished
from e3rl.types import Trajectory

SIBLINGS, LIMIT = 4, 16
CONFIG = Config(
    rollout=RolloutConfig(segment_length=5, max_rows=8),
    erasure=ErasureConfig(kappa0=0.0, perturbation_weight=1.0, max_erasures=2),
)


def digits(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """An ordinary TRL reward function over a column of the dataset."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(ch.isdigit() for ch in text) / 10 + (text == a) for text, a in zip(texts, answer, strict=True)]


class Recorder:
    """What was committed, what the reward function saw, and what the loss was computed on."""

    def __init__(self) -> None:
        self.committed: list[Trajectory] = []
        self.rewarded: list[dict[str, Any]] = []
        self.trained: list[tuple[list[int], list[int]]] = []

    def observe(self, event: Event) -> None:
        if isinstance(event, Finished):
            self.committed += event.group.trajectories

    def reward(self, completion_ids: list[list[int]], erasures: list[int], **columns: Any) -> list[float]:
        rows = zip(completion_ids, erasures, columns["segment_lengths"], columns["erased_tokens"], strict=True)
        self.rewarded += [{"ids": tuple(i), "erasures": e, "lengths": tuple(s), "erased": t} for i, e, s, t in rows]
        return [0.0] * len(completion_ids)

    def watch(self, trainer: GRPOTrainer) -> None:
        compute = trainer.compute_loss

        def watched(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            for side in ("prompt", "completion"):
                assert inputs[f"{side}_ids"].shape == inputs[f"{side}_mask"].shape
            for row in range(len(inputs["completion_ids"])):
                pair = (inputs[f"{s}_ids"][row][inputs[f"{s}_mask"][row].bool()] for s in ("prompt", "completion"))
                self.trained.append(tuple(t.tolist() for t in pair))  # type: ignore[arg-type]
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = watched


def make_trainer(directory: Path, recorder: Recorder, prompts: list[Any], **settings: Any) -> GRPOTrainer:
    tokenizer = build_tokenizer(64)
    torch.manual_seed(3)
    arguments = GRPOConfig(
        output_dir=str(directory), use_cpu=True, bf16=False, report_to=[], save_strategy="no", max_steps=3,
        num_generations=SIBLINGS, per_device_train_batch_size=2 * SIBLINGS, max_completion_length=LIMIT,
        learning_rate=1e-2, temperature=0.9, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=build_model(tokenizer),
        reward_funcs=[digits, recorder.reward],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": p, "answer": str(i)} for i, p in enumerate(prompts)]),
        processing_class=tokenizer,
        rollout_func=erasable_rollout(CONFIG, observe=recorder.observe),
    )
    recorder.watch(trainer)
    return trainer


@pytest.mark.parametrize("conversational", [False, True], ids=["text", "chat"])
def test_trl_trains_on_what_was_committed(tmp_path: Path, conversational: bool):
    texts = ["1+1=", "12+3=", "7", "2*3="]
    prompts = [[{"role": "user", "content": t}] for t in texts] if conversational else texts
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder, prompts)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 3
    assert len(recorder.committed) == 3 * 2 * SIBLINGS
    committed = sorted((list(t.prompt.ids), t.ids.tolist()) for t in recorder.committed)
    assert sorted(recorder.trained) == committed
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
    by_ids = {tuple(t.ids.tolist()): t for t in recorder.committed}
    assert sum(row["erasures"] for row in recorder.rewarded) > 0
    for row in recorder.rewarded:
        found = by_ids[row["ids"]]
        assert (row["erasures"], row["erased"]) == (len(found.erasures), found.erased_tokens)
        assert row["lengths"] == found.segment_lengths
        assert max(row["lengths"]) <= 5
    tokenizer = trainer.processing_class
    expected = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) if conversational
        else tokenizer(p)["input_ids"] for p in prompts
    ]  # fmt: skip
    assert {tuple(prompt) for prompt, _ in recorder.trained} <= {tuple(e) for e in expected}


def test_the_embedded_model_trains_in_trls_trainer(tmp_path: Path):
    """Its weights, its calibrated judge, the lab's problems and reward as they stand."""
    recorder = Recorder()
    arguments = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], save_strategy="no", max_steps=3,
        num_generations=8, per_device_train_batch_size=16, max_completion_length=60, learning_rate=1e-5,
        temperature=1.0, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    rows = [
        {"prompt": [{"role": "user", "content": p.prompt}], "answer": p.answer, **p.columns}
        for p in generate("chain", 3, "train", 8)
    ]
    trainer = GRPOTrainer(
        model=resolve_model_path("lab"), reward_funcs=[lab_reward, recorder.reward], args=arguments,
        train_dataset=Dataset.from_list(rows),
        rollout_func=erasable_rollout(load_config(find_recipe("demo")), observe=recorder.observe),
    )  # fmt: skip
    trainer.train()
    logged = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(logged) == trainer.state.global_step == 3
    assert 0.3 < sum(logged) / 3 <= 1  # it solves half of them without erasing
    assert sum(row["erasures"] for row in recorder.rewarded) > 0
    assert len(recorder.committed) == 3 * 16


def test_log_probabilities_are_the_policys_own(tmp_path: Path):
    """The engine's log-probabilities are what TRL computes for the same completions with the same weights."""
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder, ["1+1=", "12+3="])
    trainer.model.train()
    out = trainer.rollout_func(["1+1="] * SIBLINGS, trainer)
    for prompt, completion, logprobs in zip(out["prompt_ids"], out["completion_ids"], out["logprobs"], strict=True):
        ids = torch.tensor([prompt + completion])
        theirs, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), len(completion)
        )
        torch.testing.assert_close(torch.tensor(logprobs), theirs[0].detach(), atol=2e-5, rtol=1e-4)


def test_evaluation_has_its_own_number_of_siblings(tmp_path: Path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder, ["1+1="], num_generations_eval=2)
    trainer.model.eval()
    out = trainer.rollout_func(["1+1="] * 2 + ["7"] * 2, trainer)
    assert [t.sibling for t in recorder.committed] == [0, 1, 0, 1]
    assert out["prompt_ids"][0] == out["prompt_ids"][1] != out["prompt_ids"][2]
    assert not trainer.model.training


def test_groups_that_are_cut_between_processes_are_refused(tmp_path: Path):
    trainer = make_trainer(tmp_path, Recorder(), ["1+1=", "2+2="])
    trainer.model.train()
    with pytest.raises(UserError, match="no whole groups of 4"):
        trainer.rollout_func(["1+1="] * 2 + ["2+2="] * 4, trainer)


@pytest.mark.parametrize("rloo", [False, True], ids=["GRPO", "RLOO"])
def test_every_setting_of_trl_carries_over_or_has_a_reason(rloo: bool, monkeypatch: pytest.MonkeyPatch):
    kinds = (RLOOConfig, RLOOScriptArguments, ModelConfig) if rloo else (GRPOConfig, GRPOScriptArguments, ModelConfig)
    names = {f.name for kind in kinds for f in dataclasses.fields(kind)}
    left: set[str] = set()
    monkeypatch.setattr(trl_recipe, "untranslated", lambda values: (left.update(values), ())[1])
    translate(Arguments(dict.fromkeys(names) | {"model_name_or_path": "org/model"}, rloo=rloo))
    assert names > left > {"min_p", "vllm_mode"}
    assert {name for name in left if reason_for(name) is None} == set()


@pytest.mark.parametrize("kind", [GRPOConfig, RLOOConfig])
def test_defaults_are_those_of_the_installed_trl(kind: type, tmp_path: Path):
    """A setting that is left out means TRL's default; the translation of both must be the same."""
    arguments, rloo = kind(output_dir="runs", use_cpu=True, report_to=[]), kind is RLOOConfig
    names = [
        "num_generations", "max_completion_length", "temperature", "top_p", "top_k", "loss_type", "epsilon",
        "importance_sampling_level", "beta", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "seed",
        "max_grad_norm", "num_train_epochs", "max_steps", "num_iterations", "per_device_train_batch_size",
        "gradient_accumulation_steps", "gradient_checkpointing", "save_steps", "warmup_steps", "scale_rewards",
        "sapo_temperature_pos", "sapo_temperature_neg", "use_bias_correction_kl", "bf16",
        "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg",
    ]  # fmt: skip
    values = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    values |= {name: getattr(arguments, name).value for name in ("lr_scheduler_type", "eval_strategy", "save_strategy")}
    model = {"model_name_or_path": "org/model"}
    assert translate(Arguments(model | values, rloo=rloo)).tables == translate(Arguments(model, rloo=rloo)).tables
