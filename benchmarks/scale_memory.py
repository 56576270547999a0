"""Bytes that a trainer's process asks for at full size against those that are planned, for every topology of the recipes.

python benchmarks/scale_memory.py [--recipes qwen3-4b …]

The code that trains runs on fake tensors (shapes without memory), as one of so many ranks as the topology has: weights, copies,
FSDP2's shards, two micro-batches, two updates, the KV cache. Every storage is counted from its creation to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from scale_figure import Figure
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from e3rl.cli.recipes import find_recipe
from e3rl.cluster.ranks import Ranks
from e3rl.cluster.sharding import ShardedOptimizer, shard
from e3rl.config import Config, ModelConfig, load_config
from e3rl.engine.torch.storage import MIB, SlotStorage, bucketed, physical_slots, rows_within
from e3rl.models import ReferencePolicy, add_lora
from e3rl.plan.dry_run import COUNTED, Allocations, hidden_and_head
from e3rl.plan.memory import GIB, Plan, known_config, make_plan
from e3rl.train.optimizer import MasterOptimizer

CASES = (
    ("qwen3-4b", "one-h200", ()),
    ("erpo-qwen2.5-3b", "one-h200", ()),
    ("qwen3-4b", "8xh100", ()),
    ("qwen3-8b", "8xh100", ()),
    ("qwen3-4b", "32xh100", ("train.parallel=zero2",)),
    ("qwen3-8b", "32xh100", ("train.parallel=zero2",)),
)
"""Recipe, topology, and what is changed: DeepSpeed's own allocations can't be counted so, PyTorch's ZeRO-2 stands in."""


@dataclass(frozen=True)
class Asked:
    """Bytes that one process asked for: all the time, and at its worst moment."""

    held: int
    largest: int


@contextlib.contextmanager
def _ranks(count: int) -> Iterator[Any]:
    """A process group of ``count`` whose other members are not there, and its mesh."""
    if count == 1:
        yield None
        return
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        dist.destroy_process_group()


def _model(config: ModelConfig) -> Any:
    model = AutoModelForCausalLM.from_config(
        known_config(config.path), dtype=getattr(torch, config.dtype), attn_implementation=COUNTED
    )
    return add_lora(model, config) if config.lora_r else model


def _cache(config: Config, model: Any, longest: int) -> SlotStorage:
    """The torch engine's, by the rule that the engine counts its rows by."""
    shape, rollout = model.config.get_text_config(decoder=True), config.rollout
    size = shape.head_dim if getattr(shape, "head_dim", None) else shape.hidden_size // shape.num_attention_heads
    like = torch.empty(0, dtype=getattr(torch, config.model.dtype))
    one = SlotStorage(1, bucketed(longest))
    one.add_layers(shape.num_hidden_layers, shape.num_key_value_heads, size, size, like)
    row_bytes = one.bytes // physical_slots(1)
    wanted = rollout.cache_rows or 2 * rollout.max_rows
    rows = rows_within(rollout.kv_budget * MIB, row_bytes, wanted, rollout.num_generations, bucketed(longest))
    found = SlotStorage(rows, bucketed(longest))
    found.add_layers(shape.num_hidden_layers, shape.num_key_value_heads, size, size, like)
    return found


def asked(config: Config, plan: Plan, ranks: int) -> Asked:
    """Build a trainer's process and run two steps of it, without memory."""
    longest = plan.prompt + config.rollout.completion_limit
    generates = not (config.rollout.workers or config.rollout.servers)
    world = Ranks(0, ranks)
    with _ranks(ranks) as mesh, FakeTensorMode(), Allocations() as counted:
        model = _model(config.model)
        reference = ReferencePolicy(model).frozen if not config.model.lora_r else None
        generating = copy.deepcopy(model) if ranks > 1 and generates else None
        run: Any = lambda work: work(model)  # noqa: E731
        beside = None
        if ranks > 1:
            with mock.patch("e3rl.cluster.sharding.init_device_mesh", return_value=mesh):
                device = torch.device("cpu")
                run = shard(model, device, config.train, world)
                beside = None if reference is None else shard(reference, device, config.train, world, frozen=True)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        optimizer = ShardedOptimizer(named, config.train, world) if ranks > 1 else MasterOptimizer(named, config.train)
        cache = _cache(config, model, longest) if generates else None
        if config.train.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        model.train()

        for step in range(2):
            if step:  # the first makes AdamW's moments, by operations that are no part of a step
                counted.restart()
            for _ in range(2):
                logprobs, entropies = run(lambda _: hidden_and_head(model, plan.row_tokens))
                logprobs.sum().backward()
                del logprobs, entropies
            optimizer._collect()
            optimizer._apply(config.train.learning_rate)
            for master in optimizer._masters:
                master.grad = None
        held = counted.live
        del reference, beside, generating, cache, run
    return Asked(held, counted.peak)


def measure(recipe: str, topology: str, overrides: tuple[str, ...]) -> tuple[str, Asked, Plan]:
    """One trainer's process: its name, what it asked for, what was planned."""
    config = load_config(find_recipe(recipe), [find_recipe(f"topologies/{topology}")], list(overrides))
    ranks = max(1, config.train.workers)
    config = replace(config, rollout=replace(config.rollout, engine="torch"))
    plan = make_plan(config, ranks, on_cpu=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f"{recipe} {topology} {' '.join(overrides)}".strip(), asked(config, plan, ranks), plan


def plan_error() -> Figure:
    """Largest difference, in percent, of a trainer's planned bytes from those that it asks for."""
    parts = {}
    for case in CASES[:1] + CASES[2:3]:
        name, found, plan = measure(*case)
        parts[name] = 100 * abs(plan.trainer.largest / found.largest - 1)
    return Figure(max(parts.values()), 3.0, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="only these recipes")
    options = parser.parse_args()
    print("| a trainer's process | held: asked, GiB | planned | at most: asked, GiB | planned | difference, % |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in CASES:
        if options.recipes and case[0] not in options.recipes:
            continue
        name, found, plan = measure(*case)
        held, most = sum(plan.trainer.held.values()), plan.trainer.largest
        error = 100 * (most / found.largest - 1)
        sizes = " | ".join(f"{size / GIB:.2f}" for size in (found.held, held, found.largest, most))
        print(f"| {name} | {sizes} | {error:+.1f} |", flush=True)


if __name__ == "__main__":
    main()
