"""Checks whether a run fits its devices before anything is loaded, finds settings that fit, and prints plans."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence

from e3rl.config import CONTEXT_PARALLEL, Config, build_config, lay, parse_override, to_tables
from e3rl.engine.torch.storage import MIB
from e3rl.errors import UserError
from e3rl.plan.generation import Process
from e3rl.plan.memory import ASSUMED_PROMPT, GIB, Plan, device_bytes, make_plan, plan_generation

_SMALL = 0.02
"""No plan is made if weights, gradients and optimizer take less than this share of the device."""
_RANKS = (2, 4, 8, 16, 32)


def changes_that_fit(
    config: Config, plan: Plan, available: int, *, ranks: int, on_cpu: bool, most: int = 3
) -> list[str]:
    """Settings that would make the run fit, each checked with its own plan; a hint if none does."""
    if plan.largest <= available:
        return []
    found: list[str] = []
    for overrides, more in _candidates(config, plan, available, ranks):
        try:
            again = make_plan(_with(config, overrides), more, on_cpu=on_cpu)
        except UserError:
            continue
        if again.largest <= available:
            said = " ".join(overrides) + (f" on {more} devices" if more != ranks else "")
            found.append(f"fits with {said}: {again.largest / GIB:.1f} GiB")
        if len(found) == most:
            break
    return found or ["no single setting makes it fit: take a device with more memory, or a smaller model"]


def _candidates(config: Config, plan: Plan, available: int, ranks: int) -> Iterator[tuple[list[str], int]]:
    """Overrides and numbers of ranks, the least costly first."""
    train, budget = config.train, []
    worst = max(plan.processes, key=lambda process: process.largest)
    cache = worst.cache - (plan.largest - available)
    if cache > 0:
        budget = [f"rollout.kv_budget={cache // MIB}"]
        yield budget, ranks
    spare = [] if train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    if spare:
        yield spare, ranks
    longest = plan.prompt + config.rollout.completion_limit
    if train.micro_batch_tokens > longest:
        spare = [*spare, f"train.micro_batch_tokens={longest}"]
        yield spare, ranks
        if budget:
            yield [*spare, *budget], ranks
    divided = train.parallel if train.parallel in ("zero2", "fsdp2", "deepspeed-zero3") else "fsdp2"
    more = (n for n in _RANKS if n > ranks and n <= train.prompts_per_step)
    yield from itertools.islice((([f"train.parallel={divided}"], n) for n in more), len(_RANKS))
    if ranks > 1 and train.context_parallel == 1 and train.parallel in CONTEXT_PARALLEL:
        yield [*spare, f"train.context_parallel={ranks}"], ranks
    if not config.model.lora_r:
        yield ["model.lora_r=32"], ranks


def _with(config: Config, overrides: list[str]) -> Config:
    tables = to_tables(config)
    for override in overrides:
        tables = lay(tables, parse_override(override))
    return build_config(tables)


def require_fit(config: Config, ranks: int) -> None:
    """UserError, before anything is loaded, if this process or one of its Ray workers needs more memory than its device has.
    Models that can't be planned, and models far smaller than the device, pass."""
    available, on_cpu = _device(config)
    if _least(config, 16) < _SMALL * available:  # weights, gradients, AdamW's moments
        return
    plan = make_plan(config, ranks, on_cpu=on_cpu)
    mine = [plan.trainer, *(plan.processes[-1:] if config.rollout.workers else ())]
    worst = max(mine, key=lambda process: process.largest)
    if worst.largest > available:
        raise _does_not_fit(worst, available, changes_that_fit(config, plan, available, ranks=ranks, on_cpu=on_cpu))


def require_generation_fits(config: Config, prompt: int) -> None:
    """Like `require_fit`, for a process that only generates (rollout server, evaluation), with prompts of ``prompt`` tokens."""
    available, on_cpu = _device(config)
    if _least(config, 2) < _SMALL * available:
        return
    process = plan_generation(config, prompt, on_cpu=on_cpu)
    if process.largest <= available:
        return
    changes = ["take a device with more memory"]
    budget = (process.cache - (process.largest - available)) // MIB
    with contextlib.suppress(UserError):  # too little for a single group
        again = plan_generation(_with(config, [f"rollout.kv_budget={budget}"]), prompt, on_cpu=on_cpu)
        if budget > 0 and again.largest <= available:
            changes = [f"fits with rollout.kv_budget={budget}: {again.largest / GIB:.1f} GiB"]
    raise _does_not_fit(process, available, changes)


def _device(config: Config) -> tuple[int, bool]:
    """Bytes available to this process, and whether they are host memory."""
    from e3rl.models import resolve_device

    on_cpu, available = resolve_device(config.model.device).type == "cpu", device_bytes(config.model)
    if on_cpu:  # ranks of a machine share its memory
        available //= max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return available, on_cpu


def _does_not_fit(process: Process, available: int, changes: Sequence[str]) -> UserError:
    return UserError(
        f"this run does not fit: {process.largest / GIB:.1f} GiB at the worst moment of a {process.name} ({process.worst}), "
        f"{available / GIB:.1f} GiB on the device; {'; '.join(changes)}. e3rl train … --plan lists what takes it"
    )


def _least(config: Config, of_each: int) -> int:
    """Least bytes that a process takes: ``of_each`` per parameter of the model."""
    from e3rl.plan.memory import shape_of

    try:
        return of_each * sum(p.numel() for p in shape_of(config.model).parameters())
    except UserError:
        return 0


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
    if any(process.host.values()):
        yield "in its machine's memory"
        yield from (f"  {name:38}{_size(size)}" for name, size in process.host.items() if size)
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
    """The text of ``e3rl train --plan``; ``changes`` are settings that would fit."""
    share = f", {plan.trainable:,} of them trained" if plan.trainable != plan.parameters else ""
    lines = [f"{config.model.path}: {plan.parameters:,} parameters{share}, {config.model.dtype}", ""]
    for process in plan.processes:
        lines += _memory(process, alone=len(plan.processes) == 1)
    lines += ["Not counted: what CUDA, NCCL and the allocator keep for themselves (1 to 3 GiB on a GPU).", ""]
    return "\n".join([*lines, *_steps(config, plan), "", *_verdict(plan, available, changes)])
