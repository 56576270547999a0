"""Lessons: sequences with everything that their loss is made of.

Importance weights are those from the engine that generated to the trainer that learns, whose probabilities are never quite
equal. A weight multiplies the *gradient* of a token's log-probability, not an advantage: every objective's terms are
weighed, its KL term among them, while clip decisions and the reported loss stay as they are.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from e3rl.cluster.ranks import Ranks
from e3rl.config import Config, TrainConfig
from e3rl.equations.erasure import selection_weight
from e3rl.objectives.base import GroupSignals, Objective, Totals, TrainBatch
from e3rl.train.packing import TrainSequence, group_sequences, pad, uncertainties
from e3rl.train.scoring import Scores
from e3rl.types import Erasure, Group, Judgement, RewardedGroup, Segment, Trajectory


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


def weighed(lesson: Lesson, train: TrainConfig) -> Lesson:
    """The lesson with the importance weights that the settings ask for."""
    selection_T, logprobs_T = lesson.sequence.selection_T, lesson.scores.logprobs_T
    if train.importance_correction != "none":
        found = importance_weights(logprobs_T, lesson.sequence, train.importance_correction, train.importance_cap)
    elif selection_T is not None:
        found = ImportanceWeights(lesson.sequence.mask_T.to(logprobs_T.dtype), torch.zeros_like(lesson.sequence.mask_T))
    else:
        return lesson
    if selection_T is not None:
        found = replace(found, weights_T=found.weights_T * selection_T.to(found.weights_T.dtype))
    return replace(lesson, importance=found)


def with_selection(sequences: Sequence[TrainSequence], group: Group, config: Config) -> list[TrainSequence]:
    """A group's trajectories with 1/w of their segments (`selection_weight`), at most ``train.selection_cap``; 1 where nothing
    was judged. Erased candidates have no weight."""
    if config.train.selection_cap == 0:
        return list(sequences)
    passing = passing_shares(group)
    each = {t.sibling: _weights(t, passing, config) for t in group.trajectories}
    return [s if s.erased else replace(s, selection_T=each[s.sibling][s.segments_T]) for s in sequences]


def _weights(trajectory: Trajectory, passing: Mapping[int, float], config: Config) -> Tensor:
    """Of each segment; a last one is for observations, whose segment is -1."""
    cap, erasure, weights = config.train.selection_cap, config.erasure, list[float]()
    for n, segment in enumerate(trajectory.drawn_segments):
        passed = None if segment.judgement is None else passes(segment.judgement)
        w = 1.0 if passed is None else selection_weight(passed, passing[n], erasure.max_erasures, erasure.commit_anyway)
        weights.append(min(1 / w, cap) if w > 0 else cap)
    return torch.tensor([*weights, 1.0])


def passing_shares(group: Group) -> dict[int, float]:
    """By segment index, how often a candidate passed, of all that were judged there, erased turns not among them: exact where
    siblings share their prefix, an estimate behind it."""
    found = defaultdict[int, list[bool]](list)
    for trajectory in group.trajectories:
        records: list[Segment | Erasure] = [*trajectory.segments, *trajectory.erasures]
        for record in records:
            if record.observation is None and record.judgement is not None:
                found[trajectory.drawn_index(record.index)].append(passes(record.judgement))
    return {index: sum(here) / len(here) for index, here in found.items()}


def passes(judgement: Judgement) -> bool:
    """Whether the candidate was at or below its threshold."""
    return judgement.uncertainty.total <= judgement.threshold.total


def group_lessons(objective: Objective, scored: Sequence[Scored], rewarded: RewardedGroup) -> list[Lesson]:
    """A group's sequences with their advantages; erased candidates last."""
    kept = [s for s in scored if not s[0].erased]
    values = {s[0].sibling: float(rewarded.rewards[s[0].sibling].value or 0.0) for s in kept}
    u_GT = uncertainties(rewarded.group, list(values)) if "uncertainties" in objective.needs else None
    advantages_GT = objective.advantages(group_signals(kept, list(values.values()), u_GT)).float()
    lessons = [
        Lesson(sequence, scores, reference, advantage_T[: len(sequence.response_ids)], len(kept))
        for (sequence, scores, reference), advantage_T in zip(kept, advantages_GT, strict=True)
    ]
    for sequence, scores, reference in (s for s in scored if s[0].erased):
        advantage = objective.erased_advantage(values[sequence.sibling])
        lessons.append(Lesson(sequence, scores, reference, sequence.mask_T * advantage, len(kept)))
    return lessons


def lessons_of(
    objective: Objective, scored: Iterable[Scored], rewarded: Sequence[RewardedGroup], train: TrainConfig
) -> list[Lesson]:
    """Every sequence with its advantages, in the order that they came in: group by group."""
    groups = itertools.groupby(scored, key=lambda item: item[0].group)
    made = (group_lessons(objective, list(items), rewarded[g]) for g, items in groups)
    return [weighed(lesson, train) for of_group in made for lesson in of_group]


def sequences_of(
    objective: Objective, rewarded: Sequence[RewardedGroup], config: Config, first: int = 0
) -> list[list[TrainSequence]]:
    """The training sequences of each group, the first of which is number ``first`` of its step. Trajectories without a reward
    are left out, unless they are demonstrations."""
    shown, masks = "demonstrations" in objective.needs, config.train.mask_truncated_completions
    found = group_sequences([r.group for r in rewarded], "erased" in objective.needs, masks, first)
    by_group = itertools.groupby(found, key=lambda s: s.group)
    found = [s for g, some in by_group for s in with_selection([*some], rewarded[g - first].group, config)]
    kept = (s for s in found if shown or rewarded[s.group - first].rewards[s.sibling].value is not None)
    return [list(group) for _, group in itertools.groupby(kept, key=lambda s: s.group)]


def of_all_ranks(ranks: Ranks, lessons: list[Lesson], by_group: list[list[TrainSequence]]) -> list[Lesson]:
    """Every rank's lessons, of these sequences, in the order in which one process would have them."""
    if ranks.world > 1:
        sequences = [*itertools.chain(*by_group)]
        sent = ranks.gather_bytes(lessons_to_bytes(lessons, sequences))
        others = [lessons_from_bytes(b, sequences) for rank, b in enumerate(sent) if rank != ranks.rank]
        lessons = [*lessons, *itertools.chain(*others)]
    return sorted(lessons, key=lambda lesson: lesson.sequence.group)


def group_signals(lessons: Sequence[Scored], rewards: Sequence[float], u_GT: Tensor | None = None) -> GroupSignals:
    """The siblings' tensors, padded together. ``u_GT``: their `uncertainties` where they are needed."""
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
        uncertainties_GT=u_GT,
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


def most_totals(config: Config) -> Totals:
    """The most that a step's counts can be: losses of groups divide by them until the step's own are known."""
    groups, limit = config.train.prompts_per_step, config.rollout.completion_limit
    sequences = groups * config.rollout.num_generations
    return Totals(groups, sequences, sequences * limit, limit)


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


_LISTS = ("logprobs", "entropies", "shares", "reference", "advantages", "importance")
_LESSONS = pa.schema(
    [
        ("place", pa.int32()),
        ("group_size", pa.int32()),
        *((name, pa.list_(pa.float32())) for name in _LISTS),
        ("limited", pa.list_(pa.bool_())),
    ]
)


def lessons_to_bytes(lessons: Sequence[Lesson], sequences: Sequence[TrainSequence]) -> bytes:
    """Lessons for another rank as an Arrow IPC stream; it has ``sequences`` itself, of which theirs are some."""
    places = {id(sequence): n for n, sequence in enumerate(sequences)}
    weights = [lesson.importance for lesson in lessons]
    columns: dict[str, Sequence[Tensor | None]] = {
        "logprobs": [lesson.scores.logprobs_T for lesson in lessons],
        "entropies": [lesson.scores.entropies_T for lesson in lessons],
        "shares": [lesson.scores.shares_T for lesson in lessons],
        "reference": [lesson.reference_logprobs_T for lesson in lessons],
        "advantages": [lesson.advantages_T for lesson in lessons],
        "importance": [None if w is None else w.weights_T for w in weights],
        "limited": [None if w is None else w.limited_T for w in weights],
    }
    numbers = [pa.array([places[id(s.sequence)] for s in lessons], pa.int32())]
    numbers.append(pa.array([lesson.group_size for lesson in lessons], pa.int32()))
    lists = [_as_lists(columns[field.name], field.type) for field in _LESSONS if field.name in columns]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _LESSONS) as writer:
        writer.write_batch(pa.record_batch([*numbers, *lists], schema=_LESSONS))
    return bytes(sink.getvalue())


def _as_lists(tensors: Sequence[Tensor | None], kind: pa.DataType) -> pa.Array:
    """A list for each tensor; null where there is none, as erased candidates have no shares."""
    known = [tensor for tensor in tensors if tensor is not None]
    if not known:
        return pa.nulls(len(tensors), kind)
    offsets = np.cumsum([0, *(0 if tensor is None else len(tensor) for tensor in tensors)], dtype=np.int32)
    values = pa.array(torch.cat(known).numpy(), kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array([tensor is None for tensor in tensors]))


def lessons_from_bytes(content: bytes, sequences: Sequence[TrainSequence]) -> list[Lesson]:
    """What `lessons_to_bytes` was given in another rank."""
    [batch] = pa.ipc.open_stream(content)
    found = {name: _tensors(batch[name]) for name in (*_LISTS, "limited")}
    return [
        Lesson(
            sequences[place],
            Scores(logprobs_T, entropies_T, shares_T),
            reference_T,
            advantages_T,
            size,
            None if weights_T is None or limited_T is None else ImportanceWeights(weights_T, limited_T),
        )
        for place, size, logprobs_T, entropies_T, shares_T, reference_T, advantages_T, weights_T, limited_T in zip(
            batch["place"].to_pylist(), batch["group_size"].to_pylist(), *found.values(), strict=True
        )
    ]


def _tensors(lists: pa.ListArray) -> Sequence[Any]:
    if lists.null_count == len(lists):
        return [None] * len(lists)
    sizes = np.diff(lists.offsets.to_numpy()).tolist()
    tensors = torch.from_numpy(lists.values.to_numpy(zero_copy_only=False).copy()).split(sizes)
    return [tensor if there else None for tensor, there in zip(tensors, lists.is_valid().to_pylist(), strict=True)]
