"""The optimizer of several ranks: gradients added up over all of them, and, in ZeRO-1, its state divided among them.

A rank's gradients are of its share of a step's rows, and losses carry the whole step's totals: so gradients add up, and no
mean is taken. Weights are whole in every rank between steps: any rank can generate, score and save.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from e3rl.cluster.ranks import Ranks
from e3rl.config import TrainConfig
from e3rl.train.checkpoint import LazyTensors
from e3rl.train.optimizer import GradientSums, MasterOptimizer

Named = list[tuple[str, nn.Parameter]]


class DataParallelOptimizer(MasterOptimizer):
    """Every rank makes the same update from the same sum of gradients."""

    def __init__(self, parameters: Named, config: TrainConfig, ranks: Ranks) -> None:
        super().__init__(parameters, config)
        self._ranks = ranks

    def _collect(self) -> None:
        """Add the gradients up over all ranks, in float32."""
        super()._collect()
        for master in self._masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        self._ranks.add_up(m.grad for m in self._masters if m.grad is not None)


class Zero1Optimizer(MasterOptimizer):
    """Each rank holds float32 weights and AdamW's moments of its own part of the parameters, and updates that part.

    A gradient goes to the rank that owns its parameter and is dropped elsewhere; updated parameters come back from there.
    """

    def __init__(self, parameters: Named, config: TrainConfig, ranks: Ranks) -> None:
        self._ranks, self._all = ranks, parameters
        self._owner = _owners(parameters, ranks.world)
        super().__init__([(name, p) for name, p in parameters if self._owner[name] == ranks.rank], config)
        self._others = GradientSums(p for name, p in parameters if self._owner[name] != ranks.rank)
        self._shapes = {name: p.shape for name, p in parameters}

    def _collect(self) -> None:
        """Send gradients to their owners, in float32."""
        masters = dict(zip(self._names, self._masters, strict=True))
        for name, parameter in self._all:
            gradient = (self._sums if name in masters else self._others).take(parameter)
            if gradient is None:
                gradient = torch.zeros_like(parameter, dtype=torch.float32)
            dist.reduce(gradient, dst=self._owner[name])
            if name in masters:
                masters[name].grad = gradient

    def scale(self, factor: float) -> None:
        """Multiply the gathered gradients, those of other ranks' parts too."""
        super().scale(factor)
        for name, parameter in self._all:
            if self._owner[name] != self._ranks.rank:
                self._others.scale(parameter, factor)

    def step(self, rate: float) -> float:
        """Update what is owned, then publish it."""
        norm = super().step(rate)
        self._spread()
        return norm

    def _clip(self) -> float:
        """The norm over all ranks' parts; every part is scaled by the same factor."""
        squares = [m.grad.float().pow(2).sum() for m in self._masters if m.grad is not None]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=self._all[0][1].device)
        self._ranks.add_up([total])
        norm = math.sqrt(float(total)) if math.isfinite(float(total)) else float(total)
        scale = min(1.0, self._max_norm / (norm + 1e-6))
        for master in self._masters:
            if master.grad is not None and math.isfinite(norm):
                master.grad.mul_(scale)
        return norm

    @torch.no_grad()
    def _spread(self) -> None:
        for name, parameter in self._all:
            dist.broadcast(parameter.data, src=self._owner[name])

    def weights(self) -> Mapping[str, Tensor]:
        """The float32 weights, each from the rank that owns it when it is looked up."""
        mine = super().weights()
        return LazyTensors(self._shapes, lambda name: self._from_owner(mine, name, name))

    def state(self) -> Mapping[str, Tensor]:
        """AdamW's moments, in the same way."""
        mine = super().state()
        keys = ("step", "exp_avg", "exp_avg_sq") if self._ranks.any(bool(mine)) else ()
        names = (f"{name}/{key}" for name in self._shapes for key in keys)
        return LazyTensors(names, lambda name: self._from_owner(mine, name, name.rpartition("/")[0]))

    def _from_owner(self, mine: Mapping[str, Tensor], name: str, parameter: str) -> Tensor:
        """The owner's tensor ``name`` of ``parameter``, sent to every rank."""
        shape = torch.Size() if name.endswith("/step") else self._shapes[parameter]
        found = torch.empty(shape, device=self._all[0][1].device)
        if self._owner[parameter] == self._ranks.rank:
            found.copy_(mine[name].detach())
        dist.broadcast(found, src=self._owner[parameter])
        return found

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Take this rank's part of what any number of ranks saved."""
        own = {key: state[key] for key in state if self._owner[key.rpartition("/")[0]] == self._ranks.rank}
        super().load(weights, own)
        self._spread()


def _owners(parameters: Named, world: int) -> dict[str, int]:
    """The owner of each parameter: the largest first, to whoever has least."""
    load, owner = [0] * world, {}
    for name, parameter in sorted(parameters, key=lambda item: (-item[1].numel(), item[0])):
        owner[name] = load.index(min(load))
        load[owner[name]] += parameter.numel()
    return owner
