"""Plans a run before any weight is loaded: memory by process and purpose, tokens and steps.

The model is built on the meta device, which has shapes and no values. The memory of passes is counted by
running them there (`e3rl.plan.dry_run`), not estimated by a formula.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from e3rl.cluster.parallel import keeps_passes
from e3rl.config import Config, ModelConfig
from e3rl.data.loading import training_problems
from e3rl.data.prompts import render_prompts
from e3rl.engine.torch.operations import MASKED
from e3rl.errors import UserError
from e3rl.model_files import known_architecture, require_fetchable
from e3rl.models import add_lora, resolve_device, resolve_model_path, unwrapped
from e3rl.objectives import build as build_objective
from e3rl.plan.division import ShardCounts
from e3rl.plan.dry_run import COUNTED, MicroBatch, cache_row_size, micro_batch, muon_scratch
from e3rl.plan.generation import Process, Sizes, engine_bytes, generator
from e3rl.quantization import as_shapes
from e3rl.train.optimizer import muon_takes, state_width
from e3rl.train.prompts import number_of_steps
from e3rl.weights.image import image_size


def known_config(path: str) -> Any:
    """The transformers config of a model whose config.json comes with the package; None for others."""
    from transformers import AutoConfig

    found = known_architecture(path)
    return None if found is None else AutoConfig.for_model(found.pop("model_type"), **found)


ASSUMED_PROMPT = 512
AWAY = "activations set aside"
GIB = 2**30


def shape_of(config: ModelConfig) -> Any:
    """The model on the meta device, with its adapters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    found = known_config(config.path)
    if found is None:
        source = resolve_model_path(config.path)
        require_fetchable(source)
        try:
            found = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()
            raise UserError(
                f"the shape of model '{config.path}' can't be read: {reason[0] if reason else error!r}"
            ) from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            found,
            dtype=getattr(torch, config.dtype),
            attn_implementation=COUNTED,
            trust_remote_code=config.trust_remote_code,
        )
        if config.quantization != "none":
            model = as_shapes(model, config.quantization)
        return add_lora(model, config) if config.lora_r else model


@dataclass(frozen=True)
class Plan:
    """Memory of a run's processes, and the size of a step."""

    parameters: int
    trainable: int
    processes: tuple[Process, ...]  # the first trains
    prompt: int  # tokens of the longest prompt
    prompt_is_assumed: bool
    problems: int | None
    steps: int | None
    step_tokens: int  # most response tokens of a step
    row_tokens: int  # tokens that go through the model together

    @property
    def trainer(self) -> Process:
        """A process that trains."""
        return self.processes[0]

    @property
    def largest(self) -> int:
        """Peak bytes of the process that needs most."""
        return max(process.largest for process in self.processes)


def _data(config: Config) -> tuple[int, bool, int | None]:
    """Longest prompt, whether that is assumed, and the number of problems. Fetches nothing from a hub."""
    endings = ("jsonl", "json", "parquet", "csv")
    local = all(name.startswith("lab:") or name.rpartition(".")[2] in endings for name in config.data.sources)
    if local and known_config(config.model.path) is None:
        from transformers import AutoTokenizer

        problems = [p for found in training_problems(config.data).values() for p in found]
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model_path(config.model.path), trust_remote_code=config.model.trust_remote_code
        )
        prompts = render_prompts(problems, tokenizer, config.data, context_limit=2**31, completion_limit=1)
        return max(len(p.ids) for p in prompts), False, len(prompts)
    limit = config.data.max_prompt_length
    return limit or ASSUMED_PROMPT, not limit, config.data.train_limit or None


@functools.lru_cache(maxsize=8)
def _passes(
    model: ModelConfig, tokens: int, checkpointing: bool, offload: bool, parallel: str, ranks: int
) -> MicroBatch:
    shape = shape_of(model)
    return micro_batch(shape, tokens, checkpointing, ShardCounts.of(shape, parallel, ranks).collector, offload=offload)


def _trainer(
    sizes: Sizes, needs: frozenset[str], row_tokens: int, division: ShardCounts, *, generates: bool, copies: bool
) -> Process:
    """A process that trains. ``generates``: it also runs the engine; ``copies``: it keeps whole weights for the engine."""
    config, model = sizes.config, sizes.model
    trained = [p for p in model.parameters() if p.requires_grad]
    held = {
        "weights": division.weights(model.parameters()),
        "reference weights": division.frozen(model.parameters())
        if "reference" in needs and not config.model.lora_r
        else 0,
        "weights the engine generates with": sizes.weights if copies else 0,
    }
    phases: dict[str, dict[str, int]] = {}
    if generates:
        of_engine, phases = engine_bytes(sizes)
        held |= of_engine
    if "frozen" not in needs:
        copied = [p for p in trained if p.dtype != torch.float32 or division.copies_float32]
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        kept = sum(division.state([p], state_width(n, p, config.train.optimizer)) for n, p in named)
        held |= {"float32 copy of the weights": division.state(copied, 4), "optimizer": kept}
        phases |= _training(sizes, needs, row_tokens, division)
    away = phases["training"].pop(AWAY, 0) if "training" in phases else 0
    return _with_host(Process("trainer", division.ranks, held, phases or {"waiting": {}}), {AWAY: away}, sizes)


def _training(sizes: Sizes, needs: frozenset[str], row_tokens: int, division: ShardCounts) -> dict[str, dict[str, int]]:
    config, model = sizes.config, sizes.model
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = division.gradients(trained)
    train = config.train
    mine = -(-row_tokens // train.context_parallel)
    checkpoints, offload = train.gradient_checkpointing, train.activation_offload
    passes = _passes(config.model, mine, checkpoints, offload, train.parallel, division.ranks)
    waiting = waiting_rows(config, needs, row_tokens, sizes.prompt, division.ranks)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return {
        "training": {
            "weights brought together": division.gathered(model.parameters(), layers),
            "gradients": gradients,
            "activations": passes.kept,
            "keys and values of other ranks' tokens": others_tokens(model, row_tokens - mine, checkpoints or offload),
            "layers' inputs of a group's other rows": passes.kept * waiting,
            AWAY: passes.host * (1 + waiting),
            "the backward pass beside them": passes.passing,
            "attention mask": min(sizes.longest**2, MASKED) * unwrapped(model).dtype.itemsize if sizes.on_cpu else 0,
        },
        "optimizer": {"gradients": gradients, "an update's scratch": _scratch(sizes, division)},
    }


def others_tokens(model: Any, tokens: int, checkpointing: bool) -> int:
    """Bytes of keys and values of tokens that other ranks have: kept by every layer, or, where layers run again in the backward
    pass, by one. Beside them one layer's gradients, and what of these is sent."""
    if not tokens:
        return 0
    layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    return ((1 if checkpointing else layers) + 2) * cache_row_size(model).position * tokens // layers


def _scratch(sizes: Sizes, division: ShardCounts) -> int:
    """Bytes of an update's temporaries. Fused and 8-bit kernels have none; Muon goes through its matrices before AdamW."""
    train = sizes.config.train
    named = [(n, p) for n, p in sizes.model.named_parameters() if p.requires_grad]
    if train.optimizer == "muon":
        matrices = [p for n, p in named if muon_takes(n, p)]
        rest = [p for n, p in named if not muon_takes(n, p)]
        return max(muon_scratch(matrices, train), division.scratch(rest))
    return division.scratch([p for _, p in named]) if train.optimizer == "adamw" else 0


def waiting_rows(config: Config, needs: frozenset[str], row_tokens: int, prompt: int, ranks: int) -> int:
    """Rows of a group that keep their activations until its last forward pass: where one pass gives both scores and loss, and
    the advantages need the scores. Counted for a group without erasures."""
    train, rollout = config.train, config.rollout
    one_pass = train.num_iterations == 1 and "frozen" not in needs
    if not one_pass or "rewards_only" in needs or not keeps_passes(train, ranks):
        return 0
    of_a_row = max(1, (row_tokens - prompt) // rollout.completion_limit)
    return -(-rollout.num_generations // of_a_row) - 1


def _processes(sizes: Sizes, needs: frozenset[str], row_tokens: int, division: ShardCounts) -> Iterator[Process]:
    rollout, ranks = sizes.config.rollout, division.ranks
    shown = "demonstrations" in needs
    remote = bool(rollout.workers or rollout.servers) and not shown
    copies = not remote and bool(rollout.staleness or division.divides_weights)
    train = partial(_trainer, sizes, needs, row_tokens, division, generates=not (remote or shown))
    image = image_size({n: p for n, p in sizes.model.named_parameters() if p.requires_grad})
    images = 2 if rollout.staleness > 1 else 1  # new weights are written while workers still hold the old ones
    first = _with_host(
        train(copies=copies), {"image of the weights, for workers": images * image} if remote else {}, sizes
    )
    if remote and ranks > 1:  # rank 0 sends the weights
        yield replace(first, name="first trainer", count=1)
        yield replace(train(copies=False), count=ranks - 1)
    else:
        yield first
    if remote:
        worker = generator("rollout worker", rollout.workers or len(rollout.servers), sizes)
        yield _with_host(worker, {"weights as they arrive, twice": 2 * image}, sizes)


def plan_generation(config: Config, prompt: int, *, on_cpu: bool) -> Process:
    """Plan a process that only generates, with prompts of up to ``prompt`` tokens; loads no weights."""
    longest = prompt + config.rollout.completion_limit
    return generator("process that generates", 1, Sizes(config, shape_of(config.model), prompt, longest, on_cpu))


def _with_host(process: Process, host: Mapping[str, int], sizes: Sizes) -> Process:
    """The process with host memory added; on a CPU it counts as the device's."""
    return (
        replace(process, held={**process.held, **host})
        if sizes.on_cpu
        else replace(process, host={**process.host, **host})
    )


def make_plan(config: Config, ranks: int = 1, *, on_cpu: bool = True) -> Plan:
    """Plan a run in which ``ranks`` processes train together; loads no weights."""
    needs = frozenset(build_objective(config.objective).needs)
    if ranks % config.train.context_parallel:
        raise UserError(
            f"train.context_parallel = {config.train.context_parallel} divides rows among as many ranks, and {ranks} are no "
            "multiple of that: plan with --ranks"
        )
    model = shape_of(config.model)
    division = ShardCounts.of(model, config.train.parallel, ranks)
    prompt, assumed, problems = _data(config)
    rollout, train = config.rollout, config.train
    step_tokens = train.prompts_per_step * rollout.num_generations * rollout.completion_limit
    row_tokens = min(train.micro_batch_tokens, step_tokens + train.prompts_per_step * prompt)
    longest = prompt + rollout.completion_limit
    row_tokens = max(row_tokens, longest)  # a sequence is never divided
    steps = number_of_steps(config, problems) if problems else train.steps or None
    whole = shape_of(replace(config.model, quantization="none")) if config.model.quantization != "none" else model
    return Plan(
        parameters=sum(p.numel() for p in whole.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        processes=tuple(_processes(Sizes(config, model, prompt, longest, on_cpu), needs, row_tokens, division)),
        prompt=prompt,
        prompt_is_assumed=assumed,
        problems=problems,
        steps=steps,
        step_tokens=step_tokens,
        row_tokens=row_tokens,
    )


def device_bytes(config: ModelConfig) -> int:
    """Memory of the device that the config names: of the GPU, else of this machine."""
    device = resolve_device(config.device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
