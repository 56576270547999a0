"""A memory plan as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from e3rl.config import Config
from e3rl.plan.memory import ASSUMED_PROMPT, GIB, Plan, Process


def _size(size: int) -> str:
    return f"{size / GIB:9.2f} GiB" if size >= GIB else f"{size / 2**20:9.1f} MiB"


def _memory(process: Process, alone: bool) -> Iterator[str]:
    if not alone:
        yield f"{process.name}, {process.count} of them, a device each:" if process.count > 1 else f"{process.name}:"
    yield "held all the time"
    yield from (f"  {name:38}{_size(size)}" for name, size in process.held.items() if size)
    for phase, items in process.phases.items():
        yield f"during {phase:33}{_size(process.peak(phase))}   with what is held"
        yield from (f"  {name:38}{_size(size)}" for name, size in items.items() if size)
    yield ""


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


def _verdict(plan: Plan, available: int, changes: Sequence[str]) -> Iterator[str]:
    worst = max(plan.processes, key=lambda process: process.largest)
    of = f" of a {worst.name}" if len(plan.processes) > 1 else ""
    sign = "fits" if plan.largest <= available else "does not fit"
    need, there = _size(plan.largest).strip(), _size(available).strip()
    yield f"{sign}: {need} at the worst moment{of} ({worst.worst}), {there} on the device"
    yield from (f"  {change}" for change in changes)


def plan_text(config: Config, plan: Plan, available: int, changes: Sequence[str] = ()) -> str:
    """What ``e3rl train --plan`` prints; ``changes`` would make it fit."""
    share = f", {plan.trainable:,} of them trained" if plan.trainable != plan.parameters else ""
    lines = [f"{config.model.path}: {plan.parameters:,} parameters{share}, {config.model.dtype}", ""]
    for process in plan.processes:
        lines += _memory(process, alone=len(plan.processes) == 1)
    lines += ["Not counted: what CUDA, NCCL and the allocator keep for themselves (1 to 3 GiB on a GPU).", ""]
    return "\n".join([*lines, *_steps(config, plan), "", *_verdict(plan, available, changes)])
