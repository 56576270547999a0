"""Weights, gradients and optimizer state divided among ranks by PyTorch's FSDP2: ZeRO-2 and ZeRO-3.

One root holds embeddings, last norm and output matrix; each decoder layer is a unit in it. A layer's weights are brought
together when it runs: in ZeRO-3 (fsdp2) they are freed after it, in ZeRO-2 kept until its backward pass. So all ranks must
run the same passes. Gradients are reduced and added up in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from e3rl.cluster.ranks import Ranks
from e3rl.config import TrainConfig
from e3rl.errors import UserError
from e3rl.models import unwrapped
from e3rl.train.checkpoint import LazyTensors
from e3rl.train.optimizer import MasterOptimizer
from e3rl.train.scoring import Passes


class WholePass(nn.Module):
    """A pass as a module, output matrix included: whoever divides a model's weights sees every use of them in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[Any], Any]) -> Any:
        return work(self.model)


class ModulePasses(Passes):
    """Passes of models through what divides them, by model; others run as they are."""

    def __init__(self, roots: Mapping[Any, Any]) -> None:
        self._roots = roots

    def divides(self, model: Any) -> bool:
        """See `Passes.divides`."""
        return model in self._roots

    def run(self, model: Any, work: Callable[[Any], Any]) -> Any:
        """See `Passes.run`."""
        return self._roots[model](work) if model in self._roots else work(model)


def shard(model: Any, device: torch.device, config: TrainConfig, ranks: Ranks, *, frozen: bool = False) -> WholePass:
    """Divide the model among the ranks, in place; returns the root, through which it must be run.

    An empty model stays empty (`e3rl.weights.files.fill`). A ``frozen`` one has no backward pass to keep weights for.
    """
    base = unwrapped(model)
    layers = getattr(getattr(base, base.base_model_prefix), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(
            f"train.parallel = '{config.parallel}' divides a decoder's layers, and {type(base).__name__} has none that are "
            "called so; take ddp or zero1"
        )
    mesh = init_device_mesh(device.type, (ranks.world,))
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    root = WholePass(model)
    for unit in (*layers, root):
        freed = frozen or (config.parallel == "fsdp2" and unit is not root)
        sharded: Any = fully_shard(unit, mesh=mesh, reshard_after_forward=freed, mp_policy=precision)
        sharded.set_gradient_divide_factor(1.0)  # losses carry the whole step's totals: gradients add up
        sharded.set_force_sum_reduction_for_comms(True)  # gloo can't scale while it adds
    return root


class ShardedPasses(ModulePasses):
    """Passes through FSDP2's roots."""

    def rest(self, model: Any) -> None:
        """See `Passes.rest`."""
        for unit in self._roots[model].modules() if self.divides(model) else ():
            if isinstance(unit, FSDPModule):
                unit.reshard()


class ShardedOptimizer(MasterOptimizer):
    """Each rank updates its shards."""

    def __init__(self, parameters: list[tuple[str, nn.Parameter]], config: TrainConfig, ranks: Ranks) -> None:
        super().__init__(parameters, config)
        self._ranks = ranks

    @torch.no_grad()
    def _clip(self) -> float:
        """The norm over all shards, each counted once."""
        gradients = [m.grad for m in self._masters if m.grad is not None]
        total = sum((_shard(g).pow(2).sum() for g in gradients), torch.zeros((), device=self._model[0].device))
        self._ranks.add_up([total])
        norm = math.sqrt(float(total)) if math.isfinite(float(total)) else float(total)
        if math.isfinite(norm):
            scale = min(1.0, self._max_norm / (norm + 1e-6))
            for gradient in gradients:
                _shard(gradient).mul_(scale)
        return norm

    def weights(self) -> Mapping[str, Tensor]:
        """The float32 weights, each brought together when it is looked up."""
        shards = super().weights()
        return LazyTensors(shards, lambda name: _whole(shards[name]))

    def state(self) -> Mapping[str, Tensor]:
        """AdamW's moments, in the same way."""
        shards = super().state()
        return LazyTensors(shards, lambda name: _whole(shards[name]))

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Take this rank's shards of what any number of ranks saved."""
        like = dict(zip(self._names, self._masters, strict=True))
        super().load(
            LazyTensors(weights, lambda name: _as(weights[name], like[name]) if name in like else weights[name]),
            {key: _as(tensor, like[key.rpartition("/")[0]]) for key, tensor in state.items()},
        )


def _shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor divided as ``like`` is; what has no shape of its own, a step count, stays whole."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
