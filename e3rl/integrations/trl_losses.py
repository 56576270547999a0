"""TRL's settings that have no counterpart here, each with the reason. Values without effect are ignored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from e3rl.errors import UserError
from e3rl.integrations.trl_arguments import literal

_V = TypeVar("_V")

_MACHINE = "how e3rl uses the machine is set by its own settings"
_LOGS = "every step's metrics and rollouts are always recorded, and 'e3rl view' shows them"
_HUB = "a run ends in an ordinary model directory, which `hf upload` takes"
_PRECISION = "weights are model.dtype, with float32 master weights in the optimizer"
_VLLM = "it configures vLLM inside TRL; rollout.engine chooses the engine here"
_ADAPTER = "only rank, alpha, dropout and target modules of LoRA carry over"
_QUANTIZED = "model.quantization is 'nf4' or 'int8', with bitsandbytes' defaults"

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "min_p": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "top_entropy_quantile": (1, 1.0),
    "entropy_coef": (0, 0.0),
    "scale_rewards": ("group", True),
    "multi_objective_aggregation": ("sum_then_normalize",),
    "adam_epsilon": (1e-8,),
    "label_smoothing_factor": (0, 0.0),
    "gradient_checkpointing_kwargs": ({"use_reentrant": False}, {"use_reentrant": True}),
    "remove_unused_columns": (False, True),
    "average_tokens_across_devices": (True,),
    "dataloader_drop_last": (True, False),
    "train_sampling_strategy": ("random",),
    "shuffle_dataset": (True,),
    "logging_strategy": ("steps", "no"),
    "model_revision": ("main",),
    "pad_to_multiple_of": ("auto",),
    "lora_task_type": ("CAUSAL_LM",),
    "attn_implementation": ("sdpa",),
    "do_train": (True, False),
    "do_eval": (True, False),
    "length_column_name": ("length",),
    "debug": ("", []),
    "project": ("huggingface",),
    "local_rank": (-1, 0),
}
"""Values without effect, of settings without counterpart. None, False and empty values never have one."""

REASONS: dict[str, str] = {
    "min_p": "sampling has temperature, top_p and top_k",
    "repetition_penalty": "sampling has temperature, top_p and top_k",
    "generation_kwargs": "sampling has temperature, top_p and top_k",
    "cache_implementation": "the engine has its own cache, whose rows can be rolled back",
    "delta": "ratio_cap, the second upper clip, is an option of 'grpo', 'dr_grpo' and 'dapo' alone",
    "multi_objective_aggregation": "rewards are summed with their weights before they are normalised",
    "off_policy_mask_threshold": "train.importance_correction has its own masks",
    "top_entropy_quantile": "no objective here drops tokens of low entropy; ERPO weighs them",
    "entropy_coef": "no objective here has an entropy bonus",
    "use_adaptive_entropy": "no objective here has an entropy bonus",
    "sync_ref_model": "the reference policy is the model as it was before training",
    "push_to_hub": "TRL names the repository after output_dir; name yours in train.push_to_hub",
    "disable_dropout": "dropout follows the model's own configuration in training, and is off in rollouts",
    "cast_lm_head_to_fp32": "log-probabilities are computed in float32 from the head's output",
    "use_liger_kernel": "the models run with transformers' own layers",
    "adam_epsilon": "AdamW's epsilon is 1e-8",
    "lr_scheduler_kwargs": "the schedules have no options",
    "num_generations_eval": "eval.num_samples says how many samples are drawn of each held-out problem",
    "per_device_eval_batch_size": "rollout.max_rows bounds what is decoded together",
    "shuffle_dataset": "every epoch is a fresh permutation",
    "train_sampling_strategy": "every epoch is a fresh permutation",
    "data_seed": "run.seed is the one seed",
    "resume_from_checkpoint": "'e3rl train RECIPE --resume' continues a run of e3rl",
    "load_best_model_at_end": "the last model is saved; checkpoints are kept by train.save_total_limit",
    "metric_for_best_model": "the last model is saved; checkpoints are kept by train.save_total_limit",
    "neftune_noise_alpha": "it belongs to supervised training",
    "normalize_advantages": "advantages of 'rloo' are not divided by the spread of the whole batch",
    "reward_clip_range": "clip inside the reward function",
    "label_smoothing_factor": "it belongs to supervised training",
    "max_tool_calling_iterations": "environments.max_turns and max_calls say how often tools are called",
    "max_prompt_length": "TRL 1 has no such setting; data.max_prompt_length refuses longer prompts",
    "attn_implementation": "models are loaded with PyTorch's scaled dot product attention",
    "model_revision": "download the revision and name its directory in model.path",
    "model_init_kwargs": "models are loaded in model.dtype with default arguments",
    "parallelism_config": _MACHINE,
    "reward_model_name_or_path": "name it in rewards.reward_model = {path = …}, with 'reward_model' among rewards.functions",
    "datasets": "write their files and weights into data.mixture",
    "dataset_streaming": "data are read before the run, so that a bad row is found before the first step",
    "average_tokens_across_devices": "the loss is always averaged over the tokens of the whole step",
    "restore_callback_states_from_checkpoint": "there are no callbacks; listeners of a Trainer take their place",
    "trackio_space_id": "train.report_to carries over; where trackio sends its data is set in its own environment",
}

PREFIXES: tuple[tuple[str, str], ...] = (
    ("vllm_", _VLLM),
    ("use_vllm", _VLLM),
    ("transformers_continuous_batching", "the engine always batches continuously"),
    ("use_transformers_", "the engine always batches continuously"),
    ("entropy_", "no objective here has an entropy bonus"),
    ("ref_model_", "the reference policy is the model as it was before training"),
    ("log", _LOGS),
    ("num_completions_to_print", _LOGS),
    ("include_", _LOGS),
    ("disable_tqdm", _LOGS),
    ("project", _LOGS),
    ("trackio_", _LOGS),
    ("hub_", _HUB),
    ("push_to_hub", _HUB),
    ("bf16_", _PRECISION),
    ("fp16_", _PRECISION),
    ("tf32", _PRECISION),
    ("bnb_", _QUANTIZED),
    ("lora_", _ADAPTER),
    ("use_rslora", _ADAPTER),
    ("use_dora", _ADAPTER),
    ("eval_", "evaluation follows train.eval_steps and the settings of [eval]"),
    ("batch_eval", "evaluation follows train.eval_steps and the settings of [eval]"),
    ("prediction_loss_only", "evaluation follows train.eval_steps and the settings of [eval]"),
    ("greater_is_better", "the last model is saved; checkpoints are kept by train.save_total_limit"),
    ("save_", "checkpoints are complete, so that a run resumes exactly; train.save_steps sets how often"),
    ("enable_jit_checkpoint", "a run saves its state when it is asked to stop"),
    ("ddp_", _MACHINE),
    ("fsdp", _MACHINE),
    ("deepspeed", _MACHINE),
    ("ds3_", _MACHINE),
    ("accelerator_config", _MACHINE),
    ("dataloader_", _MACHINE),
    ("torch_", _MACHINE),
    ("activation_", "train.gradient_checkpointing is what there is"),
    ("gradient_checkpointing_", "train.gradient_checkpointing is what there is"),
    ("optim_", "the optimizers have no options of their own"),
    ("liger_", "the models run with transformers' own layers"),
    ("pad_to_multiple_of", _MACHINE),
    ("auto_find_batch_size", "train.micro_batch_tokens bounds what goes through the model together"),
    ("full_determinism", "every draw is a function of run.seed and its own name"),
    ("ignore_data_skip", "a resumed run continues with the next prompt"),
    ("skip_memory_metrics", _LOGS),
    ("debug", _LOGS),
    ("do_", "'e3rl train' trains and 'e3rl eval' evaluates"),
    ("use_cache", "the engine has its own cache"),
    ("remove_unused_columns", "all columns of the data reach the reward functions"),
    ("label_names", "all columns of the data reach the reward functions"),
    ("length_column_name", "all columns of the data reach the reward functions"),
    ("env", "environment variables are set where the command is run"),
    ("local_rank", _MACHINE),
    ("ignore_bias_buffers", _MACHINE),
)


def untranslated(values: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each setting that has an effect in TRL and no counterpart here."""
    for name, value in values.items():
        if value is None or value is False or value in ("", [], {}, "no", "none") or value in NEUTRAL.get(name, ()):
            continue
        reason = reason_for(name)
        yield f"{name} = {value!r}: {reason or 'this is no setting of TRL that the converter knows'}"


def reason_for(name: str) -> str | None:
    """Why a setting of TRL has no counterpart; None for an unknown setting."""
    return REASONS.get(name) or next((why for prefix, why in PREFIXES if name.startswith(prefix)), None)


class Settings:
    """TRL's settings, handed out once each; what is left over has no counterpart."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.left = dict(values)
        self.losses: list[str] = []

    def take(self, name: str, default: _V) -> _V:
        """A setting in the type of its default; null means the default, as in TRL."""
        value = literal(self.left.pop(name, None))
        if value is None:
            return default
        if isinstance(default, str) and value is False:
            value = "no"  # YAML reads 'no' as false
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if default is not None and not isinstance(value, type(default)):
            raise UserError(f"{name} = {value!r}: expected {type(default).__name__}")
        return value

    def optional(self, name: str) -> Any:
        """A setting that may be absent; None where it is."""
        return literal(self.left.pop(name, None))

    def lose(self, sentence: str) -> None:
        """Note something that does not carry over."""
        self.losses.append(sentence)
