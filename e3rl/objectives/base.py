"""The interface of objectives: advantages from a group's signals, and a loss from a micro-batch.

Shapes: G siblings of a group, S sequences of a micro-batch, T response positions (padded right), E erased candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Need = Literal["shares", "reference", "uncertainties", "erased", "demonstrations", "frozen", "rewards_only"]
"""What a trainer must provide beyond log-probabilities and entropies: attention shares (eq 19), reference-policy
log-probabilities, U of each segment, erased candidates as separate sequences, the data's solutions instead of rollouts, or
frozen weights (no backward pass, no optimizer step). "rewards_only" asks for less: `advantages` reads only rewards, mask,
segments and uncertainties, so a group larger than a micro-batch needs no forward pass before that of its loss;
log-probabilities and entropies may then be placeholders."""


@dataclass(frozen=True)
class GroupSignals:
    """Everything advantages may depend on, for the siblings of one prompt whose reward is not missing."""

    rewards_G: Tensor
    mask_GT: Tensor  # bool: real response tokens
    segments_GT: Tensor  # index of the segment a token lies in, from 0; -1 in padding
    entropies_GT: Tensor  # of the policy that made the rollout, nats
    old_logprobs_GT: Tensor
    reference_logprobs_GT: Tensor | None  # only where "reference" is needed
    shares_GT: Tensor | None  # only where "shares" is needed; each row sums to 1 over its response
    uncertainties_GT: Tensor | None = None  # U of a token's segment, where needed; -1: not judged, padding


@dataclass(frozen=True)
class Totals:
    """Counts over the whole optimizer step, so that micro-batch losses add up to the step's loss."""

    groups: int
    sequences: int  # trajectories; erased candidates are not counted
    tokens: int  # response tokens of those trajectories
    completion_limit: int  # most tokens a response may have


@dataclass(frozen=True)
class TrainBatch:
    """A micro-batch as the loss sees it. ``logprobs_ST`` carries the gradient; everything else is data."""

    logprobs_ST: Tensor
    old_logprobs_ST: Tensor
    reference_logprobs_ST: Tensor | None
    advantages_ST: Tensor
    mask_ST: Tensor  # bool: tokens in the loss
    segments_ST: Tensor  # as in GroupSignals
    group_sizes_S: Tensor  # G of the group each sequence belongs to
    erased_S: Tensor  # bool: the sequence is an erased candidate (its prefix is masked out), not a trajectory
    totals: Totals


@dataclass(frozen=True)
class Loss:
    """A micro-batch's share of the step's loss, and metrics as (sum, count) pairs that add up over micro-batches."""

    value: Tensor
    metrics: Mapping[str, tuple[float, float]]


class Objective(Protocol):
    """One small frozen dataclass whose fields are its options (`e3rl.config.setting`); both methods are pure.

    It may have ``divides_by``, the count of `Totals` ("groups", "sequences" or "tokens") that its whole loss is divided by and
    that it uses for nothing else. Groups are then learnt from as they finish (`rollout.staleness`, from 2 on).
    """

    @property
    def needs(self) -> frozenset[Need]:
        """What the trainer must provide, given these options; may be a plain attribute."""

    def advantages(self, signals: GroupSignals) -> Tensor:
        """Advantages of every response token, [G, T]; 0 in padding."""

    def erased_advantage(self, reward: float) -> float:
        """Advantage of an erased candidate whose trajectory then got ``reward``; used where "erased" is needed."""

    def loss(self, batch: TrainBatch) -> Loss:
        """The micro-batch's share of the loss to minimise."""


class AttributionOptions(Protocol):
    """The extra options of an objective that needs "shares": how attention is read (eq 19)."""

    @property
    def attribution_window(self) -> int:
        """L', the last response tokens whose attention is read."""

    @property
    def attribution_layers(self) -> Literal["last", "all"]:
        """The layers whose attention is averaged."""


class TrajectoriesOnly:
    """Base for objectives that learn only from committed trajectories: erased candidates have no advantage."""

    def erased_advantage(self, reward: float) -> float:
        """0: never used, since "erased" is not needed."""
        return 0.0
