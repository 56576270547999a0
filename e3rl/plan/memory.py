"""What a run will need, before any weight is loaded: memory by purpose, tokens and steps, and whether it fits a device.

The model is built on the meta device, which has shapes and no values. What the backward pass keeps is not estimated by a
formula but counted: a forward pass over a full micro-batch runs there, and every tensor that autograd saves is added up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from e3rl.config import Config, ModelConfig
from e3rl.data.loading import load_problems
from e3rl.data.prompts import render_prompts
from e3rl.engine.torch.fused import decoding_copy_bytes
from e3rl.engine.torch.storage import MIB, bucketed, physical_slots, rows_within
from e3rl.errors import UserError
from e3rl.model_files import known_architecture
from e3rl.models import add_lora, resolve_device, resolve_model_path
from e3rl.objectives import build as build_objective
from e3rl.plan.division import ShardCounts
from e3rl.train.prompts import number_of_steps
from e3rl.train.scoring import chunk_bytes, gradient_bytes


def known_config(path: str) -> Any:
    """The transformers config of a model whose config.json comes with the package; None for others."""
    from transformers import AutoConfig

    found = known_architecture(path)
    return None if found is None else AutoConfig.for_model(found.pop("model_type"), **found)


_COUNTED = "e3rl_counted"
ASSUMED_PROMPT = 512
GIB = 2**30


class _Kept(torch.autograd.Function):
    """Stands for flash attention: keeps queries, keys, values and its output, and no matrix of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


def _counted_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _Kept.apply(query, key, value).transpose(1, 2).contiguous(), None  # type: ignore[no-untyped-call]


AttentionInterface.register(_COUNTED, _counted_attention)
AttentionMaskInterface.register(_COUNTED, lambda *args, **kwargs: None)


def shape_of(config: ModelConfig) -> Any:
    """The model on the meta device, with its adapters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    found = known_config(config.path)
    if found is None:
        try:
            found = AutoConfig.from_pretrained(
                resolve_model_path(config.path), trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()
            raise UserError(
                f"the shape of model '{config.path}' can't be read: {reason[0] if reason else error!r}"
            ) from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            found,
            dtype=getattr(torch, config.dtype),
            attn_implementation=_COUNTED,
            trust_remote_code=config.trust_remote_code,
        )
        return add_lora(model, config) if config.lora_r else model


def saved_bytes(model: Any, tokens: int) -> int:
    """Bytes that autograd keeps of one forward pass through the layers, weights not counted."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.device("meta"):
        mask = torch.empty(1, 1, 1, 1)  # ready made: making one looks at values
        output = getattr(base, base.base_model_prefix)(input_ids=ids, attention_mask=mask, use_cache=False)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose on one device, and what a step is."""

    parameters: int
    trainable: int
    held: Mapping[str, int]  # all the time, from the first step on
    phases: Mapping[str, Mapping[str, int]]  # beside it, while that is done
    prompt: int  # tokens of the longest prompt
    prompt_is_assumed: bool
    problems: int | None
    steps: int | None
    step_tokens: int  # most response tokens of a step
    row_tokens: int  # tokens that go through the model together

    def peak(self, phase: str) -> int:
        """Bytes at the worst moment of a phase."""
        return sum(self.held.values()) + sum(self.phases[phase].values())

    @property
    def largest(self) -> int:
        """Bytes at the worst moment of all."""
        return max(self.peak(phase) for phase in self.phases)


def _data(config: Config) -> tuple[int, bool, int | None]:
    """Longest prompt, whether that is assumed, and the number of problems. Nothing is fetched from a hub for it."""
    local = config.data.train.startswith("lab:") or config.data.train.rpartition(".")[2] in (
        "jsonl",
        "json",
        "parquet",
        "csv",
    )
    if local and known_config(config.model.path) is None:
        from transformers import AutoTokenizer

        problems = load_problems(config.data.train, config=config.data, split="train")
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model_path(config.model.path), trust_remote_code=config.model.trust_remote_code
        )
        prompts = render_prompts(problems, tokenizer, config.data, context_limit=2**31, completion_limit=1)
        return max(len(p.ids) for p in prompts), False, len(prompts)
    limit = config.data.max_prompt_length
    return limit or ASSUMED_PROMPT, not limit, config.data.train_limit or None


def _kv_cache(config: Config, model: Any, capacity: int) -> int:
    shape = model.config.get_text_config(decoder=True)
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    width = 2 * shape.num_key_value_heads * head * getattr(torch, config.model.dtype).itemsize
    rollout, row_bytes = config.rollout, shape.num_hidden_layers * capacity * width
    rows = rollout.cache_rows or 2 * rollout.max_rows
    rows = rows_within(rollout.kv_budget * MIB, row_bytes, rows, rollout.num_generations, capacity)
    return physical_slots(rows) * row_bytes


def _held(
    config: Config, model: Any, needs: frozenset[str], capacity: int, division: ShardCounts, on_cpu: bool
) -> dict[str, int]:
    total = sum(p.nbytes for p in model.parameters())
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen = "frozen" in needs
    own = config.rollout.engine == "torch" and "demonstrations" not in needs
    apart = config.rollout.ahead or division.divides_weights
    return {
        "weights": division.weights(model.parameters()),
        "reference weights": total if "reference" in needs and not config.model.lora_r else 0,
        "weights the engine generates with": total if apart else 0,
        "weights laid out for decoding": decoding_copy_bytes(model) if own and on_cpu else 0,
        "float32 copy of the weights": 0
        if frozen
        else division.state((p for p in trainable if p.dtype != torch.float32 or division.copies_float32), 4),
        "optimizer": 0 if frozen else division.state(trainable, 8),
        "KV cache": _kv_cache(config, model, capacity) if own else 0,
    }


def _phases(
    config: Config, model: Any, tokens: int, longest: int, needs: frozenset[str], division: ShardCounts, on_cpu: bool
) -> dict[str, dict[str, int]]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    shape = model.config.get_text_config(decoder=True)
    vocabulary, layers = base.get_output_embeddings().weight.shape[0], shape.num_hidden_layers
    phases = {"rollout": {"logits": 4 * config.rollout.max_rows * vocabulary * 4}}
    if "frozen" in needs:
        return phases
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients = division.gradients(trainable)
    # what grows with tokens does so in proportion: counting few is exact, and quick for long contexts
    sample = min(tokens, 256)
    saved = math.ceil(saved_bytes(model, sample) / sample * tokens)
    hidden = tokens * shape.hidden_size * base.dtype.itemsize
    activations = layers * hidden + saved // layers if config.train.gradient_checkpointing else saved
    matrix = base.get_output_embeddings().weight
    phases["training"] = {
        "weights brought together": division.gathered(model.parameters(), layers),
        "gradients": gradients,
        "activations": activations,
        "gradients of one layer's activations": saved // layers,
        "attention mask": longest**2 * base.dtype.itemsize if on_cpu else 0,
        "logits": chunk_bytes(tokens, vocabulary) + (gradient_bytes(matrix) if matrix.requires_grad else 0),
    }
    largest = max(4 * p.numel() for p in trainable)
    phases["optimizer"] = {"gradients": gradients, "temporary": 2 * largest}
    return phases


def make_plan(config: Config, ranks: int = 1, *, on_cpu: bool = True) -> Plan:
    """Count everything on one of ``ranks`` devices that train together; loads no weights."""
    needs = frozenset(build_objective(config.objective).needs)
    model = shape_of(config.model)
    division = ShardCounts.of(model, config.train.parallel, ranks)
    prompt, assumed, problems = _data(config)
    rollout, train = config.rollout, config.train
    step_tokens = train.prompts_per_step * rollout.num_generations * rollout.completion_limit
    row_tokens = min(train.micro_batch_tokens, step_tokens + train.prompts_per_step * prompt)
    longest = prompt + rollout.completion_limit
    row_tokens = max(row_tokens, longest)  # a sequence is never divided
    steps = number_of_steps(config, problems) if problems else train.steps or None
    capacity = bucketed(longest)
    return Plan(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        held=_held(config, model, needs, capacity, division, on_cpu),
        phases=_phases(config, model, row_tokens, longest, needs, division, on_cpu),
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
