"""Names in TRL and verl of settings that have another name or place here, for error messages. Nothing is renamed silently."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping

SYNONYMS: Mapping[str, str] = {
    "beta": "objective.kl_coef",
    "kl_loss_coef": "objective.kl_coef",
    "epsilon": "objective.clip_low and objective.clip_high",
    "epsilon_high": "objective.clip_high",
    "clip_ratio": "objective.clip_low and objective.clip_high",
    "clip_ratio_low": "objective.clip_low",
    "clip_ratio_high": "objective.clip_high",
    "loss_type": "objective.name",
    "adv_estimator": "objective.name",
    "lr": "train.learning_rate",
    "num_train_epochs": "train.epochs",
    "total_epochs": "train.epochs",
    "max_steps": "train.steps",
    "total_training_steps": "train.steps",
    "train_batch_size": "train.prompts_per_step (verl counts prompts too)",
    "per_device_train_batch_size": "train.prompts_per_step (it counts prompts; TRL counts completions)",
    "gradient_accumulation_steps": "train.micro_batch_tokens (tokens that go through the model together; the loss is the same)",
    "generation_batch_size": "train.prompts_per_step x rollout.num_generations",
    "steps_per_generation": "train.minibatches",
    "ppo_mini_batch_size": "train.minibatches (how many there are, not their size)",
    "ppo_epochs": "train.num_iterations",
    "grad_clip": "train.max_grad_norm",
    "lr_scheduler": "train.lr_scheduler_type",
    "lr_warmup_steps": "train.warmup_steps",
    "lr_warmup_steps_ratio": "train.warmup_ratio",
    "test_freq": "train.eval_steps",
    "save_freq": "train.save_steps",
    "logger": "train.report_to",
    "log_completions": "train.show_steps",
    "num_completions_to_print": "train.show_steps",
    "n": "rollout.num_generations",
    "rollout_n": "rollout.num_generations",
    "group_size": "rollout.num_generations",
    "max_response_length": "rollout.segment_length x rollout.max_segments, or rollout.max_completion_length",
    "max_new_tokens": "rollout.max_completion_length",
    "model_name_or_path": "model.path",
    "lora_rank": "model.lora_r",
    "load_in_4bit": "model.quantization (nf4)",
    "load_in_8bit": "model.quantization (int8)",
    "target_modules": "model.lora_target_modules",
    "torch_dtype": "model.dtype",
    "dataset_name": "data.train",
    "datasets": "data.mixture",
    "interleave_probs": "data.mixture",
    "optim": "train.optimizer (adamw, adamw_fused, adamw_8bit, muon)",
    "overlong_filtering": "train.mask_truncated_completions",
    "train_files": "data.train",
    "val_files": "data.eval",
    "dataset_train_split": "data.train_split",
    "dataset_test_split": "data.eval_split",
    "prompt_key": "data.prompt_column",
    "reward_funcs": "rewards.functions",
    "reward_weights": "rewards.weights",
    "custom_reward_function": "rewards.functions",
    "filter_groups": "filter.name",
    "run_name": "run.name",
    "experiment_name": "run.name",
}


def place_of(name: str, config: type) -> str:
    """Where a setting of this name, ours or another library's, is set; '' if it is unknown. ``config``: the class `Config`."""
    places = [
        f"{section}.{field.name}"
        for section, kind in typing.get_type_hints(config).items()
        for field in dataclasses.fields(kind)
        if field.name == name
    ]
    return places[0] if len(places) == 1 else SYNONYMS.get(name, " or ".join(places))
