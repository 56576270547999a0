"""A memory plan as text."""

from __future__ import annotations

from collections.abc import Iterator

from e3rl.config import Config
from e3rl.plan.memory import ASSUMED_PROMPT, GIB, Plan

_LORA = "model.lora_r trains adapters instead of all weights"
_REMEDIES = {
    "KV cache": "set rollout.kv_budget, or lower rollout.max_rows and rollout.cache_rows",
    "activations": "lower train.micro_batch_tokens, or set train.gradient_checkpointing=true",
    "reference weights": "kl_coef = 0 needs none, nor does model.lora_r",
    "float32 copy of the weights": _LORA,
    "optimizer": _LORA,
    "gradients": _LORA,
}


def _size(size: int) -> str:
    return f"{size / GIB:9.2f} GiB" if size >= GIB else f"{size / 2**20:9.1f} MiB"


def _memory(plan: Plan) -> Iterator[str]:
    yield "held all the time"
    yield from (f"  {name:38}{_size(size)}" for name, size in plan.held.items() if size)
    for phase, items in plan.phases.items():
        yield f"during {phase:33}{_size(plan.peak(phase))}   with what is held"
        yield from (f"  {name:38}{_size(size)}" for name, size in items.items() if size)


def _steps(config: Config, plan: Plan) -> Iterator[str]:
    prompt = f"{plan.prompt} tokens"
    if plan.prompt_is_assumed:
        prompt = f"{ASSUMED_PROMPT} tokens, assumed: set data.max_prompt_length"
    yield f"longest prompt    {prompt}"
    groups = f"{config.train.prompts_per_step} prompts x {config.rollout.num_generations} responses"
    yield f"a step            {groups}, at most {plan.step_tokens:,} response tokens"
    yield f"micro-batch       {plan.row_tokens:,} tokens go through the model together"
    if plan.steps is None:
        yield "steps             unknown before the data is read: set train.steps or data.train_limit"
    else:
        yield f"steps             {plan.steps:,}, at most {plan.steps * plan.step_tokens:,} response tokens beside erased ones"


def _verdict(plan: Plan, available: int) -> Iterator[str]:
    phase = max(plan.phases, key=plan.peak)
    fits = plan.largest <= available
    sign = "fits" if fits else "does not fit"
    yield f"{sign}: {_size(plan.largest).strip()} at the worst moment ({phase}), {_size(available).strip()} on the device"
    if not fits:
        everything = {**plan.held, **plan.phases[phase]}
        largest = sorted((n for n in everything if n in _REMEDIES), key=lambda n: -everything[n])[:2]
        yield from (f"  {name}: {_size(everything[name]).strip()}; {_REMEDIES[name]}" for name in largest)


def plan_text(config: Config, plan: Plan, available: int) -> str:
    """What ``e3rl train --plan`` prints."""
    share = f", {plan.trainable:,} of them trained" if plan.trainable != plan.parameters else ""
    lines = [f"{config.model.path}: {plan.parameters:,} parameters{share}, {config.model.dtype}", ""]
    return "\n".join([*lines, *_memory(plan), "", *_steps(config, plan), "", *_verdict(plan, available)])
