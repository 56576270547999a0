"""Counts the bytes that the code allocates, by running it on the meta device, which has shapes and no memory.

`Allocations` counts every storage that an operation makes until it is freed. `micro_batch` and `engine` run the functions that
train and decode, at any size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface

from e3rl.config import TrainConfig
from e3rl.engine.protocol import Sampling
from e3rl.engine.sampling import SamplingRows, sample
from e3rl.engine.torch.cache import GenericSlotModel
from e3rl.engine.torch.fused import FusedSlotModel, FusedWeights, of_the_family
from e3rl.engine.torch.operations import Attention, LogitTransform
from e3rl.engine.torch.recorded import Step
from e3rl.engine.torch.storage import RowSize, StepRows
from e3rl.models import unwrapped
from e3rl.offload import Offload
from e3rl.train.optimizer import GradientSums, muon
from e3rl.train.scoring import head_scores, output_matrix


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside the block and are still alive. Scratch inside a kernel is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, tuple[Any, int]] = {}  # by storage: a weak reference, bytes

    def __enter__(self) -> Allocations:
        self._resize = torch.UntypedStorage.resize_
        counting = self

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            counting._resized(storage._cdata, size)
            return counting._resize(storage, size)

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local operations are counted
        found = func(*args, **(kwargs or {}))
        given = {_storage(leaf)._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and _storage(leaf)._cdata not in given:  # not a view of an argument
                self.count(leaf)
        return found

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = _storage(tensor)
        key = storage._cdata
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._resized(key, 0, gone=True)), 0
            self._resized(key, storage.nbytes())

    def _resized(self, key: int, size: int, *, gone: bool = False) -> None:
        if key not in self._known:
            return
        reference, before = self._known.pop(key)
        self.live += size - before
        self.peak = max(self.peak, self.live)
        if not gone:
            self._known[key] = reference, size

    def restart(self) -> int:
        """Reset the peak; returns the bytes that are alive."""
        self.peak = self.live
        return self.live


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


class _Kept(torch.autograd.Function):
    """Stand-in for flash attention: saves queries, keys, values and its output, but no matrix of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _counted_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _Kept.apply(query, key, value).transpose(1, 2).contiguous(), None  # type: ignore[no-untyped-call]


COUNTED = "e3rl_counted"
"""The attention implementation of a model on the meta device."""

AttentionInterface.register(COUNTED, _counted_attention)
AttentionMaskInterface.register(COUNTED, lambda *args, **kwargs: None)


@dataclass(frozen=True)
class MicroBatch:
    """Bytes of a micro-batch that is not a step's first, beside weights and the gradients gathered so far."""

    kept: int  # by autograd, after the forward pass
    passing: int  # on top of that, at the peak of the backward pass
    host: int = 0  # kept in the machine's memory (`e3rl.offload`)


def hidden_and_head(model: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of ``tokens`` tokens, as training makes them (`e3rl.train.scoring`)."""
    base = unwrapped(model)
    device = next(base.parameters()).device
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    mask = torch.empty(1, 1, 1, 1, device=device)  # given here: building one reads values
    backbone = getattr(base, base.base_model_prefix)
    hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[0]
    return head_scores(output_matrix(base), hidden, ids[0], 1.0, LogitTransform.of_model(base))


class Collector(Protocol):
    """Takes gradients as they are computed."""

    def finish(self) -> None:
        """The end of a backward pass."""


def micro_batch(
    model: Any,
    tokens: int,
    checkpointing: bool,
    collector: Callable[[list[nn.Parameter]], Collector | None] = lambda trained: None,
    *,
    offload: bool = False,
) -> MicroBatch:
    """Run two micro-batches and count the second. ``collector`` makes what gathers the gradients of several ranks; where it makes
    nothing, `GradientSums` adds them up."""
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    collects = collector(trained)
    if collects is None:
        GradientSums(trained)
    with Allocations() as counted:
        for _ in range(2):
            before = counted.restart()
            with Offload(model) if offload else nullcontext() as away:
                logprobs, entropies = hidden_and_head(model, tokens)
            kept = counted.live - before
            logprobs.sum().backward()
            if collects:
                collects.finish()
            del logprobs, entropies
            peak = counted.peak - before
    return MicroBatch(kept, max(0, peak - kept), away.bytes if away else 0)


@dataclass(frozen=True)
class EngineBytes:
    """Bytes of the torch engine."""

    cache: int
    states: int  # recurrent states, and a snapshot of each
    marks: int  # logits at the start of each row's latest candidate
    prompt: int  # while the longest prompt runs
    recorded: int  # buffers and memory of CUDA graphs; 0 where steps are not recorded
    step: int  # to decode and sample ``max_rows`` rows, beside the above


@torch.no_grad()
def engine(model: Any, rows: int, together: int, longest: int, prompt: int, *, on_gpu: bool = False) -> EngineBytes:
    """Build the torch engine's cache for ``rows`` rows of ``longest`` tokens, run a prompt and a step of ``together`` rows."""
    recorded = recorded_bytes(model, rows, together, longest) if on_gpu and of_the_family(model) else 0
    slots = GenericSlotModel(model, rows, longest)
    with Allocations() as counted:
        slots.prefill([0], 0)
        states = slots.storage.state_bytes
        cache = slots.storage.bytes - states
        before = counted.restart()
        slots.prefill([0] * prompt, 0)
        of_prompt = counted.peak - before
        before = counted.restart()
        step = StepRows([0] * together, [longest - 1] * together, slots.storage, slots.device)
        logits = slots.decode(step)
        of_pass = counted.peak - before
        if recorded:
            before = counted.restart()  # the pass works in the graphs' memory
        _draw(logits)
        of_step = counted.peak - before if recorded else max(of_pass, counted.peak - before)
    return EngineBytes(cache, states, rows * logits[0].nbytes, of_prompt, recorded, of_step)


def _draw(logits_RV: Tensor) -> None:
    settings = SamplingRows.of([Sampling(top_p=0.9, top_k=50)] * len(logits_RV), logits_RV.device)
    sample(logits_RV, settings, torch.zeros(len(logits_RV), dtype=torch.float64, device=logits_RV.device))


@torch.no_grad()
def draw_bytes(rows: int, vocabulary: int) -> int:
    """Bytes for sampling one step from float32 logits, the logits included."""
    with Allocations() as counted:
        _draw(torch.empty(rows, vocabulary, device="meta"))
    return counted.peak


@torch.no_grad()
def recorded_bytes(model: Any, rows: int, together: int, longest: int) -> int:
    """Bytes that the CUDA graphs of decode steps keep: input and output buffers, and the working memory of the widest step,
    ``together`` rows."""
    with Allocations() as counted:
        slots = FusedSlotModel(FusedWeights(model), rows, longest, record=_run_once, attend=_nothing_kept)
        step = StepRows([0] * together, [longest - 1] * together, slots.storage, slots.device)
        buffers = counted.live - slots.storage.bytes
        before = counted.restart()
        slots.decode(step)
    return buffers + counted.peak - before


def _run_once(step: Step) -> Step:
    """Stand-in for a CUDA graph, which keeps the memory that its step took while it was recorded."""
    logits = step()
    return lambda: logits


def _nothing_kept(mask_RW: Tensor, heads: int, kv_heads: int, scale: float) -> Attention:
    """Stand-in for the fused kernel, which allocates only its result."""
    return lambda query_RHD, keys, values: torch.empty_like(query_RHD).flatten(1)


@torch.no_grad()
def forward_bytes(model: Any, tokens: int) -> int:
    """Peak bytes of a forward pass of ``tokens`` tokens, without a backward pass."""
    slots = GenericSlotModel(model, 1, tokens)
    with Allocations() as counted:
        slots.prefill([0], 0)
        before = counted.restart()
        slots.prefill([0] * tokens, 0)
    return counted.peak - before


def cache_row_size(model: Any) -> RowSize:
    """Size of a row in the torch engine's cache, all layers."""
    slots = GenericSlotModel(model, 1, 1)
    with torch.no_grad():
        slots.prefill([0], 0)
    return slots.storage.row_size


def muon_scratch(matrices: Sequence[Tensor], config: TrainConfig) -> int:
    """Bytes of temporaries in Muon's update of these matrices."""
    made = [torch.nn.Parameter(torch.empty(p.shape, device="meta")) for p in matrices]
    if not made:
        return 0
    optimizer = muon(made, config)
    for parameter in made:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()  # allocates its momentum
    with Allocations() as counted:
        optimizer.step()
    return counted.peak
