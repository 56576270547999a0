"""Memory of a process whose engine generates: a trainer, a rollout worker or server, an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from e3rl.config import Config
from e3rl.engine.torch.fused import decoding_copy_bytes
from e3rl.engine.torch.storage import MIB, bucketed, rows_within
from e3rl.engine.vllm.core import BATCHED_TOKENS, kv_cache_bytes
from e3rl.plan.dry_run import cache_row_size, draw_bytes, engine, forward_bytes

KV_CACHE, RECURRENT_STATES = "KV cache", "recurrent states and snapshots"


@dataclass(frozen=True)
class Process:
    """Bytes by purpose of one kind of process. ``count`` of them run, each on its own device."""

    name: str
    count: int
    held: Mapping[str, int]  # all the time, from the first step on
    phases: Mapping[str, Mapping[str, int]]  # on top of ``held``, while the phase runs
    host: Mapping[str, int] = field(default_factory=dict)  # host memory, where the device has its own

    def peak(self, phase: str) -> int:
        """Peak bytes of a phase."""
        return sum(self.held.values()) + sum(self.phases[phase].values())

    @property
    def cache(self) -> int:
        """What `rollout.kv_budget` bounds."""
        return self.held.get(KV_CACHE, 0) + self.held.get(RECURRENT_STATES, 0)

    @property
    def worst(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=self.peak)

    @property
    def largest(self) -> int:
        """Peak bytes of all phases."""
        return self.peak(self.worst)


@dataclass(frozen=True)
class Sizes:
    """What a process's bytes depend on."""

    config: Config
    model: Any  # on the meta device
    prompt: int
    longest: int
    on_cpu: bool

    @property
    def weights(self) -> int:
        return sum(p.nbytes for p in self.model.parameters())


def _torch_engine(sizes: Sizes) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """What the torch engine holds beside the weights that it generates with, and what its phases take."""
    rollout, longest = sizes.config.rollout, sizes.longest
    rows = rollout.cache_rows or 2 * rollout.max_rows
    row_bytes = cache_row_size(sizes.model).of(longest)
    rows = rows_within(rollout.kv_budget * MIB, row_bytes, rows, rollout.num_generations, bucketed(longest))
    found = engine(sizes.model, rows, min(rollout.max_rows, rows), longest, sizes.prompt, on_gpu=not sizes.on_cpu)
    held = {
        "weights laid out for decoding": decoding_copy_bytes(sizes.model) if sizes.on_cpu else 0,
        KV_CACHE: found.cache,
        RECURRENT_STATES: found.states,
        "logits at candidates' starts": found.marks,
        "CUDA graphs and their buffers": found.recorded,
    }
    return held, {"prompts": {"a prompt's pass": found.prompt}, "decoding": {"a step's pass and draws": found.step}}


def _vllm_engine(sizes: Sizes) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """The same for vLLM, which has its own copy of the weights."""
    rollout, parts = sizes.config.rollout, sizes.config.rollout.vllm_tensor_parallel_size
    rows = rollout.cache_rows or 2 * rollout.max_rows
    held = {
        "vLLM's weights": sizes.weights // parts,
        KV_CACHE: kv_cache_bytes(sizes.model, rows, sizes.longest, rollout.kv_budget * MIB, parts),
    }
    draws = draw_bytes(rollout.max_rows, sizes.model.get_input_embeddings().weight.shape[0])
    largest = forward_bytes(sizes.model, BATCHED_TOKENS) // parts
    return held, {"decoding": {"vLLM's largest pass": largest, "a step's draws": draws}}


def engine_bytes(sizes: Sizes) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """What the recipe's engine holds beside the weights that it generates with, and what its phases take; empty for a
    plug-in engine."""
    kinds = {"torch": _torch_engine, "vllm": _vllm_engine}
    name = sizes.config.rollout.engine
    return kinds[name](sizes) if name in kinds else ({}, {"decoding": {}})


def generator(name: str, count: int, sizes: Sizes) -> Process:
    """A process that generates and does nothing else."""
    held, phases = engine_bytes(sizes)
    return Process(name, count, {"weights": sizes.weights, **held}, phases)
