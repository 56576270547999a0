"""From rewarded rollouts to a better policy: signals, advantages, losses, optimizer updates.

The learner is blind to the algorithm: it asks the objective what it needs, gives it tensors and minimises what it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from e3rl.config import Config
from e3rl.errors import UserError
from e3rl.models import Policy, ReferencePolicy
from e3rl.objectives.base import AttributionOptions, GroupSignals, Objective, Totals, TrainBatch
from e3rl.train.attribution import attribution_layers
from e3rl.train.importance import ImportanceWeights, importance_weights, weigh_gradient
from e3rl.train.metrics import Means
from e3rl.train.optimizer import MasterOptimizer, learning_rate
from e3rl.train.scoring import AttributionSettings, PaddedSequences, Scores, response_scores, score_sequences
from e3rl.train.sequences import TrainSequence, group_sequences, pad, plan_micro_batches
from e3rl.types import RewardedGroup


@dataclass(frozen=True)
class Lesson:
    """A sequence with everything that its loss is made of."""

    sequence: TrainSequence
    scores: Scores
    reference_logprobs_T: Tensor | None
    advantages_T: Tensor
    group_size: int
    importance: ImportanceWeights | None = None


@dataclass(frozen=True)
class Update:
    """What one round of optimizer updates reports: metrics that add up, and the largest gradient norm."""

    means: dict[str, float]
    grad_norm: float
    learning_rate: float


def group_signals(
    lessons: Sequence[tuple[TrainSequence, Scores, Tensor | None]], rewards: Sequence[float]
) -> GroupSignals:
    """The siblings' tensors, padded together."""
    cpu = torch.device("cpu")
    sequences, scores, references = zip(*lessons, strict=True)
    return GroupSignals(
        rewards_G=torch.tensor(rewards, dtype=torch.float64),
        mask_GT=pad([s.mask_T for s in sequences], False, cpu),
        segments_GT=pad([s.segments_T for s in sequences], -1, cpu),
        entropies_GT=pad([s.entropies_T for s in scores], 0.0, cpu),
        old_logprobs_GT=pad([s.logprobs_T for s in scores], 0.0, cpu),
        reference_logprobs_GT=None if references[0] is None else pad(references, 0.0, cpu),
        shares_GT=None if scores[0].shares_T is None else pad([s.shares_T for s in scores], 0.0, cpu),
    )


def totals_of(lessons: Sequence[Lesson], completion_limit: int) -> Totals:
    """Counts of an optimizer step, over trajectories alone."""
    kept = [lesson.sequence for lesson in lessons if not lesson.sequence.erased]
    return Totals(
        groups=len({s.group for s in kept}),
        sequences=len(kept),
        tokens=sum(len(s.response_ids) for s in kept),
        completion_limit=completion_limit,
    )


class Learner:
    """Owns the objective, the optimizer and the reference policy of one run."""

    def __init__(self, policy: Policy, objective: Objective, config: Config, updates: int) -> None:
        self._policy, self._objective, self._config, self._updates = policy, objective, config, updates
        self.optimizer = MasterOptimizer(policy.trainable(), config.train)
        self.reference = ReferencePolicy(policy.model) if "reference" in objective.needs else None
        self._attribution = None
        if "shares" in objective.needs:
            options = cast(AttributionOptions, objective)
            layers = attribution_layers(policy.model, options.attribution_layers)
            self._attribution = AttributionSettings(options.attribution_window, layers)
        if config.train.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable()

    def updates_per_step(self) -> int:
        return self._config.train.num_iterations * self._config.train.minibatches

    def _reference_logprobs(self, sequences: Sequence[TrainSequence]) -> list[Tensor] | list[None]:
        if self.reference is None:
            return [None] * len(sequences)
        with self.reference.model() as model:
            scores = score_sequences(
                model,
                sequences,
                temperature=self._config.rollout.temperature,
                token_budget=self._config.train.micro_batch_tokens,
            )
        return [s.logprobs_T for s in scores]

    def prepare(self, rewarded: Sequence[RewardedGroup]) -> list[Lesson]:
        """Score the rollouts and give every sequence its advantages; trajectories without a reward teach nothing.

        Demonstrations need none: they are learnt from because they are shown.
        """
        shown = "demonstrations" in self._objective.needs
        sequences = [
            s
            for s in group_sequences([r.group for r in rewarded], "erased" in self._objective.needs)
            if shown or rewarded[s.group].rewards[s.sibling].value is not None
        ]
        if not sequences:
            return []
        scores = score_sequences(
            self._policy.model,
            sequences,
            temperature=self._config.rollout.temperature,
            token_budget=self._config.train.micro_batch_tokens,
            attribution=self._attribution,
        )
        scored = list(zip(sequences, scores, self._reference_logprobs(sequences), strict=True))
        lessons: list[Lesson] = []
        for group in range(len(rewarded)):
            lessons += self._group_lessons([s for s in scored if s[0].group == group], rewarded[group])
        return [self._weighed(lesson) for lesson in lessons]

    def _weighed(self, lesson: Lesson) -> Lesson:
        """The lesson with the importance weights that the settings ask for."""
        correction, cap = self._config.train.importance_correction, self._config.train.importance_cap
        if correction == "none":
            return lesson
        trainer_T, engine_T = lesson.scores.logprobs_T, lesson.sequence.rollout_logprobs_T
        return replace(
            lesson, importance=importance_weights(trainer_T, engine_T, lesson.sequence.mask_T, correction, cap)
        )

    def _group_lessons(
        self, scored: list[tuple[TrainSequence, Scores, Tensor | None]], rewarded: RewardedGroup
    ) -> list[Lesson]:
        kept = [s for s in scored if not s[0].erased]
        if not kept:
            return []
        values = {s[0].sibling: float(rewarded.rewards[s[0].sibling].value or 0.0) for s in kept}
        advantages_GT = self._objective.advantages(group_signals(kept, list(values.values()))).float()
        lessons = [
            Lesson(sequence, scores, reference, advantage_T[: len(sequence.response_ids)], len(kept))
            for (sequence, scores, reference), advantage_T in zip(kept, advantages_GT, strict=True)
        ]
        for sequence, scores, reference in (s for s in scored if s[0].erased):
            advantage = self._objective.erased_advantage(values[sequence.sibling])
            lessons.append(Lesson(sequence, scores, reference, sequence.mask_T * advantage, len(kept)))
        return lessons

    def update(self, lessons: Sequence[Lesson], update: int) -> Update:
        """All optimizer updates of one step, none where weights are frozen; ``update`` counts those before it."""
        if "frozen" in self._objective.needs:
            return Update({}, 0.0, 0.0)
        train, means, norms, rate = self._config.train, Means(), [0.0], 0.0
        groups = sorted({lesson.sequence.group for lesson in lessons})
        self._policy.model.train()
        for _ in range(train.num_iterations):
            for part in range(train.minibatches):
                chosen = set(groups[part :: train.minibatches])
                minibatch = [lesson for lesson in lessons if lesson.sequence.group in chosen]
                rate = learning_rate(train, update, self._updates)
                if minibatch:
                    self._accumulate(minibatch, means)
                    norms.append(self.optimizer.step(rate))
                    if not norms[-1] < float("inf"):
                        raise UserError(
                            f"the gradient is {norms[-1]} at optimizer update {update}; the weights were left as they were. "
                            "Look at this step's rollouts, lower train.learning_rate or use float32."
                        )
                update += 1
        return Update(means.values(), max(norms), rate)

    def _accumulate(self, lessons: Sequence[Lesson], means: Means) -> None:
        """Gradients of one optimizer step, micro-batch by micro-batch."""
        totals = totals_of(lessons, self._config.rollout.completion_limit)
        budget, total = self._config.train.micro_batch_tokens, 0.0
        for indices in plan_micro_batches([lesson.sequence.length for lesson in lessons], budget):
            batch = self._train_batch([lessons[i] for i in indices], totals)
            loss = self._objective.loss(batch)
            loss.value.backward()
            means.add(loss.metrics)
            total += float(loss.value.detach())
        means.add({"loss": (total, 1.0)})

    def _train_batch(self, lessons: Sequence[Lesson], totals: Totals) -> TrainBatch:
        device = self._policy.device
        sequences = [lesson.sequence for lesson in lessons]
        padded = PaddedSequences.of(sequences, device)
        logprobs_ST, _ = response_scores(self._policy.model, padded, self._config.rollout.temperature)
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
            mask_ST=pad([s.mask_T for s in sequences], False, device),
            segments_ST=pad([s.segments_T for s in sequences], -1, device),
            group_sizes_S=torch.tensor([lesson.group_size for lesson in lessons], device=device),
            erased_S=torch.tensor([s.erased for s in sequences], device=device),
            totals=totals,
        )
