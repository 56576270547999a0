"""How several ranks train one model: what each value of ``train.parallel`` does.

The learner sees two things: passes through the model, and an optimizer that steps with the gathered gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from e3rl.cluster.ranked_optimizer import DataParallelOptimizer, Zero1Optimizer
from e3rl.cluster.ranks import Ranks
from e3rl.cluster.sharding import ShardedOptimizer, ShardedPasses, shard
from e3rl.config import TrainConfig
from e3rl.errors import UserError
from e3rl.models import Policy, unwrapped
from e3rl.offload import Offload
from e3rl.train.attribution import packed_attention
from e3rl.train.optimizer import MasterOptimizer
from e3rl.train.packing import PackedRow, TrainSequence, recurrent_mixers
from e3rl.train.scoring import Passes, RowScores

LOCKSTEP = ("zero2", "fsdp2", "deepspeed-zero2", "deepspeed-zero3")
"""Values of ``train.parallel`` under which all ranks must run the same number of passes: they exchange tensors in them."""

KEEPS_PASSES = ("none", "ddp", "zero1", "zero2", "fsdp2")
"""Values of ``train.parallel`` under which several forward passes may come before the first one's backward pass."""

DIVIDED = ("zero2", "fsdp2", "deepspeed-zero3")
"""Values of ``train.parallel`` under which no rank holds all weights between steps."""


class Optimizer(Protocol):
    """The optimizer of all ranks. Every method is called by all ranks together; names are those of parameters."""

    nonfinite: tuple[str, ...]

    def step(self, rate: float) -> float:
        """Apply the gathered gradients at this learning rate; returns their norm. NaN or inf leaves all untouched."""

    def weights(self) -> Mapping[str, Tensor]:
        """The float32 weights, whole; brought together when they are looked up, one after the other."""

    def state(self) -> Mapping[str, Tensor]:
        """Moments and step counts, AdamW's as ``NAME/exp_avg``, ``NAME/exp_avg_sq``, ``NAME/step``, in the same way."""

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Take what `weights` and `state` gave, under any number of ranks and any ``train.parallel``."""


@dataclass(frozen=True)
class Way:
    """A model made ready to be trained."""

    optimizer: Optimizer
    passes: Passes


class OffloadingPasses(Passes):
    """Passes that hold what their backward passes need in the machine's memory."""

    def run(self, model: Any, work: Callable[[Any], Any]) -> Any:
        """See `Passes.run`."""
        with Offload(model):
            return work(model)


def _passes(config: TrainConfig) -> Passes:
    return OffloadingPasses() if config.activation_offload else Passes()


def _whole(kind: Callable[[list[tuple[str, nn.Parameter]], TrainConfig, Ranks], Optimizer]) -> Callable[..., Way]:
    return lambda policy, frozen, config, ranks: Way(kind(policy.trainable(), config, ranks), _passes(config))


def _fsdp2(policy: Policy, frozen: nn.Module | None, config: TrainConfig, ranks: Ranks) -> Way:
    """Each rank reads its own part of the weights, of the frozen model too."""
    roots = {policy.model: shard(policy.model, policy.device, config, ranks)}
    if frozen is not None:
        roots[frozen] = shard(frozen, policy.device, config, ranks, frozen=True)

    def fill() -> None:
        for model in roots:
            policy.fill(model)

    ranks.attempt(fill)
    return Way(ShardedOptimizer(policy.trainable(), config, ranks), ShardedPasses(roots))


def _deepspeed(policy: Policy, frozen: nn.Module | None, config: TrainConfig, ranks: Ranks) -> Way:
    from e3rl.cluster.deepspeed import DeepSpeedOptimizer, EnginePasses, start_engine

    engine = start_engine(policy, config, ranks)
    if frozen is not None:
        ranks.attempt(lambda: policy.fill(frozen))
    return Way(DeepSpeedOptimizer(engine, policy, ranks), EnginePasses(engine, policy.model))


WAYS: dict[str, Callable[[Policy, nn.Module | None, TrainConfig, Ranks], Way]] = {
    "ddp": _whole(DataParallelOptimizer),
    "zero1": _whole(Zero1Optimizer),
    "zero2": _fsdp2,
    "fsdp2": _fsdp2,
    "deepspeed-zero2": _deepspeed,
    "deepspeed-zero3": _deepspeed,
}


def make_ready(
    policy: Policy, frozen: nn.Module | None, config: TrainConfig, ranks: Ranks, context: Ranks | None = None
) -> Way:
    """The way that ``train.parallel`` names, the model prepared for it in place; of one rank, the ordinary one.

    ``frozen`` is the reference model, where that is another. Both may be empty where the way divides weights, and are filled.
    ``context`` are the ranks that divide each row's tokens.
    """
    if ranks.world == 1:
        return Way(MasterOptimizer(policy.trainable(), config), _passes(config))
    if config.context_parallel > 1 and recurrent_mixers(policy.model):
        kind = type(unwrapped(policy.model)).__name__
        raise UserError(
            f"train.context_parallel = {config.context_parallel}: {kind} has layers that carry a state from token to token, "
            "which ranks would have to run one after the other; leave it at 1"
        )
    way = WAYS[config.parallel](policy, frozen, config, ranks)
    way.passes.context = context or Ranks()
    return way


def in_lockstep(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether ranks must run the same number of passes."""
    return ranks.world > 1 and config.parallel in LOCKSTEP


def keeps_passes(config: TrainConfig, world: int) -> bool:
    """Whether a pass waits for its backward pass while others run: one that keeps its layers' inputs alone can.

    Not with several updates a batch: it would spare the first one's scoring pass and hold a whole group's inputs for it.
    """
    ways = world == 1 or config.parallel in KEEPS_PASSES
    return config.gradient_checkpointing and config.minibatches == 1 and ways


def divides_weights(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether the trained model is divided, so that it can't generate."""
    return ranks.world > 1 and config.parallel in DIVIDED


def idle_pass(passes: Passes, model: Any) -> RowScores:
    """A forward pass without effect, inside `packed_attention`, to keep pace with another rank."""
    zeros_T = torch.zeros(1)
    nothing = TrainSequence((0, 0), (0,), zeros_T.long(), zeros_T == 0, zeros_T, 0, 0, False)
    return passes.score_row(model, PackedRow.of([nothing], next(model.parameters()).device), 1.0)


def idle_backward(passes: Passes, found: RowScores) -> None:
    """Its backward pass, which adds nothing to any gradient."""
    passes.backward(found.logprobs_N.sum() * 0.0)


def idle_passes(passes: Passes, model: Any, number: int, *, backward: bool) -> None:
    """Passes without effect, while other ranks make theirs. Ranks agree on the number before the first pass of a phase: they
    exchange tensors in passes, so one that is done can't ask the others meanwhile."""
    for _ in range(number):
        with packed_attention(model), torch.set_grad_enabled(backward):
            found = idle_pass(passes, model)
            if backward:
                idle_backward(passes, found)
