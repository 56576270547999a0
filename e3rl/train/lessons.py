"""Lessons: sequences with everything that their loss is made of.

Importance weights are those from the engine that generated to the trainer that learns, whose probabilities are never quite
equal. A weight multiplies the *gradient* of a token's log-probability, not an advantage: every objective's terms are
weighed, its KL term among them, while clip decisions and the reported loss stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from e3rl.objectives.base import GroupSignals, Totals, TrainBatch
from e3rl.train.packing import TrainSequence, pad
from e3rl.train.scoring import Scores


@dataclass(frozen=True)
class ImportanceWeights:
    """A sequence's weights, and where the cap changed them."""

    weights_T: Tensor
    limited_T: Tensor  # bool


def importance_weights(
    trainer_logprobs_T: Tensor, sequence: TrainSequence, correction: str, cap: float
) -> ImportanceWeights:
    """pi_trainer / pi_engine of each token, or of its whole segment or sequence, kept within ``cap``.

    ``correction`` is 'token_', 'segment_' or 'sequence_' and then 'truncate' (a larger weight becomes ``cap``) or 'mask' (it
    becomes 0). Outside the sequence's mask weights are 0 and nothing counts: a ratio is over the tokens that the loss is
    about. The engine's log-probabilities are those of the weights that drew each segment, so each ratio is against the
    right old policy, however many versions a response has.
    """
    engine_logprobs_T, mask_T = sequence.rollout_logprobs_T, sequence.mask_T
    level, _, action = correction.partition("_")
    log_ratios_T = (trainer_logprobs_T - engine_logprobs_T).double().where(mask_T, 0.0)
    if level == "sequence":
        log_ratios_T = log_ratios_T.sum().expand_as(log_ratios_T)
    elif level == "segment":
        _, places_T = sequence.segments_T.unique(return_inverse=True)
        log_ratios_T = torch.zeros_like(log_ratios_T).index_add(0, places_T, log_ratios_T)[places_T]
    ratios_T = log_ratios_T.exp()
    limited_T = (ratios_T > cap) & mask_T
    weights_T = torch.where(limited_T, cap if action == "truncate" else 0.0, ratios_T).where(mask_T, 0.0)
    return ImportanceWeights(weights_T.to(trainer_logprobs_T.dtype), limited_T)


def weigh_gradient(logprobs_ST: Tensor, weights_ST: Tensor) -> Tensor:
    """The same log-probabilities, their gradient multiplied by the weights."""
    return logprobs_ST.detach() + weights_ST * (logprobs_ST - logprobs_ST.detach())


Scored = tuple[TrainSequence, Scores, Tensor | None]
"""A sequence, what the policy says of it, and its reference log-probabilities where they are needed."""


@dataclass(frozen=True)
class Lesson:
    """A sequence with everything that its loss is made of."""

    sequence: TrainSequence
    scores: Scores
    reference_logprobs_T: Tensor | None
    advantages_T: Tensor
    group_size: int
    importance: ImportanceWeights | None = None


def group_signals(lessons: Sequence[Scored], rewards: Sequence[float]) -> GroupSignals:
    """The siblings' tensors, padded together."""
    cpu = torch.device("cpu")
    sequences, scores, references = zip(*map(over_drawn, lessons), strict=True)
    return GroupSignals(
        rewards_G=torch.tensor(rewards, dtype=torch.float64),
        mask_GT=pad([s.mask_T for s in sequences], False, cpu),
        segments_GT=pad([s.segments_T for s in sequences], -1, cpu),
        entropies_GT=pad([s.entropies_T for s in scores], 0.0, cpu),
        old_logprobs_GT=pad([s.logprobs_T for s in scores], 0.0, cpu),
        reference_logprobs_GT=None if references[0] is None else pad(references, 0.0, cpu),
        shares_GT=None if scores[0].shares_T is None else pad([s.shares_T for s in scores], 0.0, cpu),
    )


def over_drawn(scored: Scored) -> Scored:
    """The same with shares over drawn tokens alone, which add up to 1: a reward is not divided among observations."""
    sequence, scores, reference = scored
    if scores.shares_T is None or bool(sequence.mask_T.all()):
        return scored
    shares_T = scores.shares_T.where(sequence.mask_T, 0.0)
    return sequence, replace(scores, shares_T=shares_T / shares_T.sum().clamp(min=1e-30)), reference


def unscored(sequence: TrainSequence) -> Scores:
    """Placeholder scores of a sequence before its pass, for advantages that don't depend on them."""
    return Scores(sequence.rollout_logprobs_T, torch.zeros_like(sequence.rollout_logprobs_T), None)


def totals_of(sequences: Iterable[TrainSequence], completion_limit: int) -> Totals:
    """Counts of an optimizer step, over trajectories alone."""
    kept = [s for s in sequences if not s.erased]
    return Totals(
        groups=len({s.group for s in kept}),
        sequences=len(kept),
        tokens=max(1, sum(int(s.loss_mask_T.sum()) for s in kept)),
        completion_limit=completion_limit,
    )


def train_batch(lessons: Sequence[Lesson], logprobs_ST: Tensor, totals: Totals) -> TrainBatch:
    """A micro-batch as the loss sees it: the lessons are the rows of ``logprobs_ST``."""
    device = logprobs_ST.device
    sequences = [lesson.sequence for lesson in lessons]
    weights = [lesson.importance.weights_T for lesson in lessons if lesson.importance is not None]
    if weights:
        logprobs_ST = weigh_gradient(logprobs_ST, pad(weights, 0.0, device))
    references = [lesson.reference_logprobs_T for lesson in lessons]
    return TrainBatch(
        logprobs_ST=logprobs_ST,
        old_logprobs_ST=pad([lesson.scores.logprobs_T for lesson in lessons], 0.0, device),
        reference_logprobs_ST=None
        if references[0] is None
        else pad([r for r in references if r is not None], 0.0, device),
        advantages_ST=pad([lesson.advantages_T for lesson in lessons], 0.0, device),
        mask_ST=pad([s.loss_mask_T for s in sequences], False, device),
        segments_ST=pad([s.segments_T for s in sequences], -1, device),
        group_sizes_S=torch.tensor([lesson.group_size for lesson in lessons], device=device),
        erased_S=torch.tensor([s.erased for s in sequences], device=device),
        totals=totals,
    )
