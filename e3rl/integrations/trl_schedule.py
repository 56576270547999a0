"""Converts TRL's batch sizes, lengths and intervals (completions, optimizer updates) to groups and steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from e3rl.errors import UserError
from e3rl.integrations.trl_losses import Settings

_TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "swanlab")


@dataclass(frozen=True)
class Batches:
    """What one step here holds: groups of rollouts, and the optimizer updates that one pass over them makes."""

    prompts_per_step: int
    minibatches: int


def batches(
    *,
    per_device: int,
    processes: int,
    accumulation: int,
    generations: int,
    generation_batch_size: int | None = None,
    steps_per_generation: int | None = None,
) -> Batches:
    """TRL's batch sizes, which count completions, as groups and updates. Raises UserError where TRL would refuse."""
    at_once, per_update = per_device * processes, per_device * processes * accumulation
    if generation_batch_size is not None and steps_per_generation is not None:
        raise UserError("generation_batch_size and steps_per_generation are both set; TRL takes one of them")
    rollout = generation_batch_size or at_once * (steps_per_generation or accumulation)
    if rollout % at_once:
        raise UserError(f"generation_batch_size = {rollout} is no multiple of the {at_once} completions taken at once")
    step = max(rollout, per_update)
    if step % min(rollout, per_update):
        raise UserError(
            f"a rollout has {rollout} completions and an update takes {per_update}: neither divides the other, "
            "so no step here corresponds to them"
        )
    if rollout % generations or step % generations:
        raise UserError(
            f"{rollout} completions a rollout are no whole groups of num_generations = {generations}, which TRL refuses too; "
            f"if it trained on several processes, here {processes}, say on how many: --processes N"
        )
    return Batches(step // generations, step // per_update)


def train_table(settings: Settings, generations: int, processes: int) -> tuple[dict[str, Any], int]:
    """Batch, length and schedule; and the optimizer updates that one step makes."""
    accumulation = settings.take("gradient_accumulation_steps", 1)
    found = batches(
        per_device=settings.take("per_device_train_batch_size", 8),
        processes=processes,
        accumulation=accumulation,
        generations=generations,
        generation_batch_size=settings.optional("generation_batch_size"),
        steps_per_generation=settings.optional("steps_per_generation"),
    )
    minibatches = min(found.minibatches, found.prompts_per_step)
    if found.prompts_per_step % found.minibatches:
        settings.lose(
            f"{found.minibatches} updates over {found.prompts_per_step} groups: a minibatch holds whole groups here, "
            f"so the recipe makes {minibatches} of different sizes"
        )
    iterations = settings.take("num_iterations", 1)
    table: dict[str, Any] = {
        "prompts_per_step": found.prompts_per_step,
        "minibatches": minibatches,
        "num_iterations": iterations,
        "learning_rate": settings.take("learning_rate", 1e-6),
        "weight_decay": settings.take("weight_decay", 0.0),
        "adam_beta1": settings.take("adam_beta1", 0.9),
        "adam_beta2": settings.take("adam_beta2", 0.999),
        "gradient_checkpointing": settings.take(
            "activation_checkpointing", settings.take("gradient_checkpointing", True)
        ),
    }
    if routers := settings.optional("router_aux_loss_coef"):
        table["router_loss"] = float(routers)
    if settings.take("mask_truncated_completions", False):
        table["mask_truncated_completions"] = True
    table |= _optimizer(settings)
    norm = settings.take("max_grad_norm", 1.0)
    if norm > 0:
        table["max_grad_norm"] = norm
    else:
        settings.lose("max_grad_norm = 0: gradients are always clipped; the recipe keeps train.max_grad_norm = 1")
    updates = iterations * minibatches
    max_steps, epochs = settings.take("max_steps", -1), settings.take("num_train_epochs", 3.0)
    table |= {"steps": math.ceil(max_steps / updates)} if max_steps > 0 else {"epochs": epochs}
    table |= _schedule(settings) | _correction(settings)
    return table, updates


_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw_fused",
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), "adamw_8bit"),
}


def _optimizer(settings: Settings) -> dict[str, Any]:
    name = settings.optional("optim")
    if name is None:
        return {}
    if name not in _OPTIMIZERS:
        settings.lose(f"optim = {name!r}: the recipe takes AdamW; train.optimizer has adamw_fused, adamw_8bit and muon")
    return {"optimizer": _OPTIMIZERS.get(name, "adamw")}


def _schedule(settings: Settings) -> dict[str, Any]:
    name, given = settings.take("lr_scheduler_type", "linear"), settings.optional("warmup_steps") or 0
    ratio = settings.optional("warmup_ratio") or 0
    warmup = float(given or ratio)
    if name == "constant":
        warmup = 0.0  # transformers has no warm-up for 'constant'
    rise = {"warmup_steps": int(warmup)} if warmup >= 1 else {"warmup_ratio": warmup}
    known = {"constant_with_warmup": "constant", "constant": "constant", "linear": "linear", "cosine": "cosine"}
    if name not in known:
        settings.lose(f"lr_scheduler_type = {name!r}: there are constant, linear and cosine; the recipe takes linear")
    return {"lr_scheduler_type": known.get(name, "linear"), **rise}


def _correction(settings: Settings) -> dict[str, Any]:
    """Importance weights between trainer and engine, which TRL has only with vLLM."""
    mode = settings.take("vllm_importance_sampling_mode", "sequence_mask")
    wanted = settings.take("vllm_importance_sampling_correction", True)
    cap = settings.take("vllm_importance_sampling_clip_max", 3.0)
    if not (settings.left.get("use_vllm") is True and wanted):
        return {}
    return {"importance_correction": mode, "importance_cap": cap}


def rhythm_table(settings: Settings, updates: int) -> dict[str, Any]:
    """Evaluation and checkpoint intervals, which TRL counts in optimizer updates, and trackers."""
    logs = settings.optional("logging_steps")
    every = {
        "eval_steps": (settings.take("eval_strategy", "no"), settings.optional("eval_steps") or logs or 10),
        "save_steps": (settings.take("save_strategy", "steps"), settings.optional("save_steps") or 500),
    }
    table: dict[str, Any] = {}
    for name, (strategy, steps) in every.items():
        if strategy == "steps" and steps >= 1:
            table[name] = math.ceil(steps / updates)
        else:
            table[name] = 0
            if strategy != "no":
                settings.lose(f"{name}: it is a number of steps here, not every epoch or a share of the run")
    if settings.left.get("push_to_hub") is True and settings.left.get("hub_model_id"):
        settings.take("push_to_hub", False)
        table["push_to_hub"] = settings.take("hub_model_id", "")
    table["save_total_limit"] = settings.optional("save_total_limit") or 0
    names = settings.optional("report_to") or []
    several = [names] if isinstance(names, str) else list(names)
    table["report_to"] = list(_TRACKERS) if "all" in several else [n for n in several if n in _TRACKERS]
    if others := [n for n in several if n not in (*_TRACKERS, "none", "all")]:
        settings.lose(f"report_to = {others}: there are {', '.join(_TRACKERS)}")
    return table
