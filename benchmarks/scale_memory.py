"""Bytes that a trainer's process asks for at full size against those that are planned, for every topology of the recipes.

python benchmarks/scale_memory.py [--recipes qwen3-4b …]

The code that trains and generates runs on fake tensors (shapes without memory), as one of so many ranks as the topology has:
weights, copies, FSDP2's shards, two micro-batches, two updates, the KV cache, graphs, a prompt, a decode step. Every storage is
counted from its creation to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import multiprocessing
import warnings
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from scale_figure import Figure
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from e3rl.cli.recipes import find_recipe
from e3rl.cluster.ranks import Ranks
from e3rl.cluster.sharding import ShardedOptimizer, shard
from e3rl.config import Config, ModelConfig, load_config
from e3rl.engine.protocol import Sampling
from e3rl.engine.sampling import SamplingRows, sample
from e3rl.engine.torch.cache import GenericSlotModel
from e3rl.engine.torch.decode import Marks, SlotRow
from e3rl.engine.torch.fused import FusedSlotModel, FusedWeights, of_the_family
from e3rl.engine.torch.storage import MIB, SlotStorage, StepRows, bucketed, physical_slots, rows_within
from e3rl.models import add_lora
from e3rl.objectives import build as build_objective
from e3rl.plan.dry_run import COUNTED, Allocations, _nothing_kept, _run_once, hidden_and_head
from e3rl.plan.generation import Process
from e3rl.plan.memory import GIB, Plan, known_config, make_plan, plan_generation, waiting_rows
from e3rl.train.optimizer import MasterOptimizer

Case = tuple[str, str, tuple[str, ...]]
CASES: tuple[Case, ...] = (
    ("qwen3-4b", "one-h200", ()),
    ("qwen3-4b", "8xh100", ()),
    ("qwen3-8b", "8xh100", ()),
    ("qwen3-4b", "32xh100", ("train.parallel=zero2",)),
    ("qwen3-8b", "32xh100", ("train.parallel=zero2",)),
    ("erpo-qwen2.5-3b", "one-h200", ()),
    ("qwen3-8b", "8xh100", ("model.lora_r=16",)),
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
    if not config.lora_r:
        return model
    with mock.patch.object(nn.Module, "to", _to):
        return add_lora(model, config)


def _to(moved: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """As `nn.Module.to`, which exchanges a fake tensor for its copy, and can't where anything else knows it."""
    for module in moved.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device != device or parameter.dtype != (dtype or parameter.dtype):
                copied = parameter.detach().to(device, dtype)
                setattr(module, name, nn.Parameter(copied, requires_grad=parameter.requires_grad))
    return moved


def _rows(config: Config, longest: int) -> int:
    """The torch engine's, by the rule that the engine counts them by."""
    shape, rollout = known_config(config.model.path), config.rollout
    size = shape.head_dim if getattr(shape, "head_dim", None) else shape.hidden_size // shape.num_attention_heads
    one = SlotStorage(1, bucketed(longest))
    like = torch.empty(0, dtype=getattr(torch, config.model.dtype))
    one.add_layers(shape.num_hidden_layers, shape.num_key_value_heads, size, size, like)
    row_bytes = one.bytes // physical_slots(1)
    wanted = rollout.cache_rows or 2 * rollout.max_rows
    return rows_within(rollout.kv_budget * MIB, row_bytes, wanted, rollout.num_generations, bucketed(longest))


def asked_to_generate(config: Config, prompt: int) -> Asked:
    """The torch engine as on a GPU, beside the weights: cache, graphs, a prompt, a step of as many rows as it decodes together,
    their draws. Attention is a kernel that makes its result alone."""
    longest = prompt + config.rollout.completion_limit
    rows = _rows(config, longest)
    together = min(config.rollout.max_rows, rows)
    with torch.device("meta"):
        model = _model(config.model)
    flash = mock.patch("e3rl.engine.torch.fused.attention", lambda query, *_, **__: torch.empty_like(query))
    with torch.no_grad(), flash, Allocations() as counted:
        recorded = of_the_family(model)
        if recorded:
            slots: Any = FusedSlotModel(FusedWeights(model), rows, longest, record=_run_once, attend=_nothing_kept)
        else:
            slots = GenericSlotModel(model, rows, longest)
            slots.prefill([0], 0)  # makes its cache
        step = StepRows([0] * together, [longest - 1] * together, slots.storage, slots.device)
        buffers = counted.restart()
        logits = slots.decode(step)
        graphs = counted.peak - buffers if recorded else 0  # what a graph works in, it keeps
        marks = Marks(rows)
        marks.keep([SlotRow(1, [0])], logits[:1])
        held = counted.restart() + graphs
        drawn = SamplingRows.of([Sampling(top_p=0.9, top_k=50)] * together, slots.device)
        sample(logits, drawn, torch.zeros(together, dtype=torch.float64, device=slots.device))
        slots.prefill([0] * prompt, 0)
        largest = counted.peak + graphs
        del slots, marks, logits, step
    return Asked(held, largest)


def asked(config: Config, plan: Plan, ranks: int) -> Asked:
    """Build a trainer's process and run two steps of it, without memory."""
    generates = not (config.rollout.workers or config.rollout.servers)
    world = Ranks(0, ranks)
    needs = frozenset(build_objective(config.objective).needs)
    waiting = waiting_rows(config, needs, plan.row_tokens, plan.prompt, ranks)
    with _ranks(ranks) as mesh, FakeTensorMode(), Allocations() as counted:
        model = _model(config.model)
        reference = (
            None if config.model.lora_r else _model(config.model).requires_grad_(False)
        )  # a copy is of another mode
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
        if config.train.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        model.train()

        for step in range(2):
            if step:  # the first makes AdamW's moments, by operations that are no part of a step
                counted.restart()
            for _ in range(2):
                rows = [run(lambda _: hidden_and_head(model, plan.row_tokens)) for _ in range(1 + waiting)]
                while rows:
                    rows.pop()[0].sum().backward()
            optimizer._collect()
            optimizer._apply(config.train.learning_rate)
            for master in optimizer._masters:
                master.grad = None
        held = counted.live
        del reference, beside, generating, run
    engine = asked_to_generate(config, plan.prompt).held if generates else 0
    return Asked(held + engine, counted.peak + engine)


def measure(recipe: str, topology: str, overrides: tuple[str, ...]) -> tuple[str, Asked, Process]:
    """One trainer's process: its name, what it asked for, what was planned."""
    config = load_config(find_recipe(recipe), [find_recipe(f"topologies/{topology}")], list(overrides))
    ranks = max(1, config.train.workers)
    config = replace(config, rollout=replace(config.rollout, engine="torch"))
    plan = make_plan(config, ranks, on_cpu=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f"{recipe} {topology} {' '.join(overrides)}".strip(), asked(config, plan, ranks), plan.trainer


def measure_worker(recipe: str, topology: str) -> tuple[str, Asked, Process]:
    """A rollout worker's process with the torch engine, which an evaluation's is as well."""
    config = load_config(find_recipe(recipe), [find_recipe(f"topologies/{topology}")], ["rollout.engine=torch"])
    process = plan_generation(config, config.data.max_prompt_length, on_cpu=False)
    found, weights = asked_to_generate(config, config.data.max_prompt_length), process.held["weights"]
    return f"{recipe} {topology}, a rollout worker", Asked(found.held + weights, found.largest + weights), process


def _each(recipes: Collection[str], cases: Iterable[Case] = CASES) -> Iterator[tuple[str, Asked, Process]]:
    """Every process of the recipes' topologies, each counted in a process of its own: PyTorch's fake process group can't be made
    twice in one."""
    apart = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=apart, max_tasks_per_child=1) as processes:
        for case in cases:
            if case[0] in recipes:
                yield processes.submit(measure, *case).result()
        for recipe in ("qwen3-4b", "qwen3-8b"):
            if recipe in recipes:
                yield processes.submit(measure_worker, recipe, "32xh100").result()


def plan_error() -> Figure:
    """Largest difference, in percent, of a process's planned bytes from those that it asks for."""
    parts = {
        name: 100 * abs(process.largest / found.largest - 1)
        for name, found, process in _each(("qwen3-4b", "qwen3-8b"), CASES[:2])
    }
    return Figure(max(parts.values()), 3.0, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    recipes = sorted({case[0] for case in CASES})
    parser.add_argument("--recipes", nargs="+", metavar="NAME", default=recipes, help="only these: %(default)s")
    options = parser.parse_args()
    print("| a process | held: asked, GiB | planned | at most: asked, GiB | planned | difference, % |")
    print("| --- | --- | --- | --- | --- | --- |")
    for counted in _each(options.recipes):
        _print(*counted)


def _print(name: str, found: Asked, process: Process) -> None:
    held, most = sum(process.held.values()), process.largest
    error = 100 * (most / found.largest - 1)
    sizes = " | ".join(f"{size / GIB:.2f}" for size in (found.held, held, found.largest, most))
    print(f"| {name} | {sizes} | {error:+.1f} |", flush=True)


if __name__ == "__main__":
    main()
