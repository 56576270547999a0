"""From rewarded rollouts to a better policy: signals, advantages, losses, optimizer updates.

The learner is blind to the algorithm: it asks the objective what it needs, gives it tensors and minimises what it returns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from e3rl.cluster.parallel import idle_backward, idle_pass, idle_passes, in_lockstep, keeps_passes, make_ready
from e3rl.cluster.ranks import Ranks
from e3rl.config import Config
from e3rl.models import Policy, ReferencePolicy, has_dropout
from e3rl.objectives.base import Objective, Totals
from e3rl.train.attribution import AttributionSettings, packed_attention, router_loss
from e3rl.train.lessons import (
    Lesson,
    lessons_of,
    most_totals,
    of_all_ranks,
    sequences_of,
    totals_of,
    train_batch,
    unscored,
    weighed,
)
from e3rl.train.metrics import Means, Update
from e3rl.train.nonfinite import NonFinite, NonFiniteNumbers, find_nonfinite
from e3rl.train.optimizer import MasterOptimizer, learning_rate
from e3rl.train.packing import PackedRow, TrainSequence, packed_rows, plan_rows, recurrent_mixers
from e3rl.train.scoring import RowScores, Scores, score_rows
from e3rl.types import RewardedGroup


class Learner:
    """Owns the objective, the optimizer and the reference policy of one run."""

    def __init__(
        self, policy: Policy, objective: Objective, config: Config, updates: int, ranks: Ranks | None = None
    ) -> None:
        self._policy, self._objective, self._config, self._updates = policy, objective, config, updates
        ranks = ranks or Ranks()
        self._ranks, context = ranks.blocks(config.train.context_parallel)  # those divide groups, these rows
        self._found: NonFinite | None = None
        self.reference = ReferencePolicy(policy.model) if "reference" in objective.needs else None
        self._lockstep = in_lockstep(config.train, self._ranks)
        frozen = self.reference.frozen if self.reference is not None else None
        way = make_ready(policy, frozen, config.train, ranks, context)
        self.optimizer, self.passes = way.optimizer, way.passes
        self._attribution = AttributionSettings.of(objective, policy.model)
        train = config.train
        self._one_pass = train.num_iterations == 1 and "frozen" not in objective.needs and not has_dropout(policy.model)
        self._whole = bool(recurrent_mixers(policy.model))  # what sequences share is computed for each of them
        if train.router_loss:
            router_loss(policy.model)  # refuses models that have none
        self._rewards_only = "rewards_only" in objective.needs
        self._keeps_passes = keeps_passes(train, self._ranks.world)
        self._divides_by: str = getattr(objective, "divides_by", "")
        whole = self._one_pass and train.minibatches == 1 and isinstance(self.optimizer, MasterOptimizer)
        self.streams = whole and (self._divides_by == "tokens" or (self._divides_by != "" and not train.router_loss))
        """Whether groups can be learnt from before the last one is there; of other objectives and settings, not exactly."""
        if train.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable()

    def updates_per_step(self) -> int:
        return self._config.train.num_iterations * self._config.train.minibatches

    def learn(self, rewarded: Sequence[RewardedGroup], update: int) -> tuple[list[Lesson], Update]:
        """A whole step: what was learnt from, and the updates; ``update`` counts those before it.

        Where the weights that are trained are the old policy, one forward pass is everything: its log-probabilities,
        detached, are the old ones, and its entropies and shares make the advantages that its loss then uses. Of several
        minibatches that is the first; the others are scored before its update.
        """
        if not self._one_pass:
            lessons = self.prepare(rewarded)
            return lessons, self.update(lessons, update)
        parts, means, rate = self._config.train.minibatches, Means(), 0.0
        by_group = sequences_of(self._objective, rewarded, self._config)
        waiting = self._prepared([g for n, g in enumerate(by_group) if n % parts], rewarded) if parts > 1 else []
        lessons, norm, rate = self._learn_at_once(by_group[::parts], rewarded, update, means)
        norms = [norm]
        for part in range(1, parts):
            chosen = {group[0].group for group in by_group[part::parts]}
            norm, rate = self._learn_scored([s for s in waiting if s.sequence.group in chosen], update + part, means)
            norms.append(norm)
        lessons = sorted(lessons + waiting, key=lambda lesson: lesson.sequence.group)
        return lessons, Update(means.of_ranks(self._ranks.gather).values() if lessons else {}, max(norms), rate)

    def learn_arriving(self, arriving: Iterable[Sequence[RewardedGroup]], update: int) -> tuple[list[Lesson], Update]:
        """As `learn`, of groups that arrive a few at a time: their gradients are gathered as they come (`streams`).

        A loss divides by a count of the whole step: at first by the most that it can be, and gradients are scaled at the end."""
        means, rewarded, lessons, loss = Means(), list[RewardedGroup](), list[Lesson](), 0.0
        most, sequences = most_totals(self._config), list[list[TrainSequence]]()
        for groups in arriving:
            by_group = sequences_of(self._objective, groups, self._config, first=len(rewarded))
            rewarded, sequences = [*rewarded, *groups], [*sequences, *by_group]
            learnt, value = self._learn_groups(self._ranks.share(by_group), rewarded, most, means)
            lessons, loss = [*lessons, *learnt], loss + value
        if lessons := of_all_ranks(self._ranks, lessons, sequences):
            totals = totals_of(itertools.chain(*sequences), most.completion_limit)
            scale = getattr(most, self._divides_by) / getattr(totals, self._divides_by)
            cast(MasterOptimizer, self.optimizer).scale(scale)
            means.add({"loss": (loss * scale, float(self._ranks.first))})
        means = means.of_ranks(self._ranks.gather)
        return lessons, Update(means.values(), *self._step(lessons, update))

    def _learn_at_once(
        self, by_group: list[list[TrainSequence]], rewarded: Sequence[RewardedGroup], update: int, means: Means
    ) -> tuple[list[Lesson], float, float]:
        """An update with groups that were not scored before: their lessons, the gradients' norm, the learning rate."""
        totals = totals_of(itertools.chain(*by_group), self._config.rollout.completion_limit)
        lessons, loss = self._learn_groups(self._ranks.share(by_group), rewarded, totals, means)
        lessons = of_all_ranks(self._ranks, lessons, by_group)
        if lessons:
            means.add({"loss": (loss, float(self._ranks.first))})
        return lessons, *self._step(lessons, update)

    def _learn_groups(
        self, mine: list[list[TrainSequence]], rewarded: Sequence[RewardedGroup], totals: Totals, means: Means
    ) -> tuple[list[Lesson], float]:
        """Gradients of groups that were not scored before: their lessons, and their part of the loss."""
        lessons, loss = list[Lesson](), 0.0
        plan = plan_rows(mine, self._config.train.micro_batch_tokens, whole=self._whole)
        parts = [self._packed([s for i in indices for s in mine[i]]) for indices in plan]
        references = iter(self._reference_logprobs([row for _, rows in parts for row in rows]))
        scored, slots = self._scored_apart([rows for _, rows in parts]), self._slots([len(rows) for _, rows in parts])
        idle = self._idle(sum(slots))
        for index, most in enumerate(slots):
            part, scores = (parts[index], scored[index]) if index < len(parts) else (([], []), None)
            learnt, value = self._learn_part(*part, most, scores, references, rewarded, totals, means)
            lessons += learnt
            loss += value
        idle_passes(self.passes, self._policy.model, idle, backward=True)
        return lessons, loss

    def _scored_apart(self, parts: Sequence[Sequence[PackedRow]]) -> list[list[Scores] | None]:
        """Scores of the parts that need passes of their own for them; None for the others.

        That is a group larger than a micro-batch where scores make the advantages and passes are not kept.
        """
        apart = [len(rows) > 1 and not (self._rewards_only or self._keeps_passes) for rows in parts]
        chosen = [row for rows in itertools.compress(parts, apart) for row in rows]
        scores = iter(self._scores(self._policy.model, chosen, self._attribution))
        return [
            list(itertools.islice(scores, sum(len(row.paths) for row in rows))) if is_apart else None
            for rows, is_apart in zip(parts, apart, strict=True)
        ]

    def _slots(self, rows: list[int]) -> list[int]:
        """Number of passes for each part: its rows, or the busiest rank's where ranks run in lockstep."""
        if not (self._lockstep and self._keeps_passes) or self._rewards_only:
            return rows
        return [max(each) for each in itertools.zip_longest(*self._ranks.gather(rows), fillvalue=0)]

    def _learn_part(
        self,
        sequences: list[TrainSequence],
        rows: list[PackedRow],
        most: int,
        scores: list[Scores] | None,
        references: Iterator[Tensor | None],
        rewarded: Sequence[RewardedGroup],
        totals: Totals,
        means: Means,
    ) -> tuple[list[Lesson], float]:
        """Lessons of whole groups and their part of the loss, whose gradients are gathered in one pass through each row;
        idle passes make them ``most``.

        Without ``scores``, advantages that are made of them need every row's forward pass before the first backward pass.
        """
        waiting = scores is None and len(rows) > 1 and self._rewards_only
        passes = self._forward(rows, None if scores or waiting else self._attribution)
        self._policy.model.train()
        with packed_attention(self._policy.model):
            if waiting:  # for scores, which the loss needs and advantages don't
                scores = [unscored(sequence) for sequence in sequences]
            elif scores is None:
                passes = list(passes)
                scores = [of_sequence for found in passes for of_sequence in found.by_sequence()]
            idle = [idle_pass(self.passes, self._policy.model) for _ in range(most - len(rows))]
            lessons = lessons_of(
                self._objective, zip(sequences, scores, references, strict=False), rewarded, self._config.train
            )
            learnt = self._backward_rows(lessons, passes, totals, means, waiting)
            for found in idle:
                idle_backward(self.passes, found)
        return learnt

    def _forward(
        self, rows: Iterable[PackedRow], attribution: AttributionSettings | None = None
    ) -> Iterable[RowScores]:
        """A pass through each row, made when it is asked for."""
        temperature = self._config.rollout.temperature
        return (self.passes.score_row(self._policy.model, row, temperature, attribution) for row in rows)

    def _backward_rows(
        self,
        lessons: Iterable[Lesson],
        passes: Iterable[RowScores],
        totals: Totals,
        means: Means,
        waiting: bool = False,
    ) -> tuple[list[Lesson], float]:
        """Gradients of rows; the lessons, with the scores that they were ``waiting`` for, and their part of the loss."""
        left, learnt, total = iter(lessons), list[Lesson](), 0.0
        for found in passes:
            these = list(itertools.islice(left, len(found.row.paths)))
            if waiting:
                scored = zip(these, found.by_sequence(), strict=True)
                these = [weighed(replace(lesson, scores=scores), self._config.train) for lesson, scores in scored]
            total += self._backward(these, found, totals, means)
            learnt += these
        return learnt, total

    def _reference_logprobs(self, rows: Sequence[PackedRow]) -> Sequence[Tensor | None]:
        if self.reference is None:
            return [None] * sum(len(row.paths) for row in rows)
        with self.reference.model() as model:
            return [s.logprobs_T for s in self._scores(model, rows)]

    def _scores(
        self, model: Any, rows: Sequence[PackedRow], attribution: AttributionSettings | None = None
    ) -> list[Scores]:
        """`score_rows`, at the pace of the busiest rank where the model is divided."""
        idle = self._idle(len(rows)) if self.passes.divides(model) else 0
        found = score_rows(self.passes, model, rows, self._config.rollout.temperature, attribution)
        idle_passes(self.passes, model, idle, backward=False)
        self.passes.rest(model)
        return found

    def prepare(self, rewarded: Sequence[RewardedGroup]) -> list[Lesson]:
        """Score the rollouts and give every sequence its advantages, in a pass of their own."""
        return self._prepared(sequences_of(self._objective, rewarded, self._config), rewarded)

    def _prepared(self, by_group: list[list[TrainSequence]], rewarded: Sequence[RewardedGroup]) -> list[Lesson]:
        sequences, rows = self._packed([*itertools.chain(*self._ranks.share(by_group))])
        scores = self._scores(self._policy.model, rows, self._attribution)
        scored = zip(sequences, scores, self._reference_logprobs(rows), strict=True)
        lessons = lessons_of(self._objective, scored, rewarded, self._config.train)
        return of_all_ranks(self._ranks, lessons, by_group)

    def _idle(self, mine: int) -> int:
        """Passes that the busiest rank makes beyond this one's ``mine``, where tensors are exchanged in passes; 0 elsewhere."""
        return max(self._ranks.gather(mine)) - mine if self._lockstep else 0

    def _packed(self, sequences: list[TrainSequence]) -> tuple[list[TrainSequence], list[PackedRow]]:
        """Sequences, and the rows that they are packed into."""
        budget, routers = self._config.train.micro_batch_tokens, self._config.train.router_loss > 0
        return sequences, packed_rows(sequences, budget, self._policy.device, whole=self._whole, routers=routers)

    def update(self, lessons: Sequence[Lesson], update: int) -> Update:
        """All optimizer updates of one step, none where weights are frozen; ``update`` counts those before it."""
        if "frozen" in self._objective.needs:
            return Update({}, 0.0, 0.0)
        train, means, norms, rate = self._config.train, Means(), [0.0], 0.0
        groups = sorted({lesson.sequence.group for lesson in lessons})
        for _ in range(train.num_iterations):
            for part in range(train.minibatches):
                chosen = set(groups[part :: train.minibatches])
                minibatch = [lesson for lesson in lessons if lesson.sequence.group in chosen]
                norm, rate = self._learn_scored(minibatch, update, means)
                norms.append(norm)
                update += 1
        return Update(means.of_ranks(self._ranks.gather).values(), max(norms), rate)

    def _learn_scored(self, lessons: Sequence[Lesson], update: int, means: Means) -> tuple[float, float]:
        """An update with scored lessons; returns as `_step`."""
        if lessons:
            self._accumulate(lessons, means)
        return self._step(lessons, update)

    def _step(self, lessons: Sequence[Lesson], update: int) -> tuple[float, float]:
        """One optimizer update with the gathered gradients, none where there are no lessons: their norm, the learning rate."""
        rate = learning_rate(self._config.train, update, self._updates)
        if not lessons:
            return 0.0, rate
        found, self._found = self._found, None
        norm = self.optimizer.step(rate)
        if not math.isfinite(norm):
            located = [f for f in self._ranks.gather(found) if f is not None]
            alone = NonFinite("gradient", norm, parameters=self.optimizer.nonfinite)
            raise NonFiniteNumbers((located or [alone])[0], update)
        return norm, rate

    def _accumulate(self, lessons: Sequence[Lesson], means: Means) -> None:
        """Gradients of one optimizer step with scored lessons, of which this rank takes its share, row by row."""
        totals = totals_of((lesson.sequence for lesson in lessons), self._config.rollout.completion_limit)
        groups = set(self._ranks.share(sorted({lesson.sequence.group for lesson in lessons})))
        mine = [lesson for lesson in lessons if lesson.sequence.group in groups]
        model = self._policy.model
        model.train()
        _, rows = self._packed([lesson.sequence for lesson in mine])
        idle = self._idle(len(rows))
        with packed_attention(model):
            _, loss = self._backward_rows(mine, self._forward(rows), totals, means)
        idle_passes(self.passes, model, idle, backward=True)
        means.add({"loss": (loss, float(self._ranks.first))})

    def _backward(self, lessons: Sequence[Lesson], scored: RowScores, totals: Totals, means: Means) -> float:
        """Gradients of one micro-batch, whose lessons are the sequences of the row; returns its part of the loss."""
        batch = train_batch(lessons, scored.logprobs_ST(), totals)
        loss = self._objective.loss(batch)
        if scored.router_loss is not None:  # each row counts by its tokens
            share = totals_of((lesson.sequence for lesson in lessons), totals.completion_limit).tokens / totals.tokens
            means.add({"router_loss": (share * float(scored.router_loss.detach()), share)})
            loss = replace(loss, value=loss.value + self._config.train.router_loss * share * scored.router_loss)
        found = find_nonfinite([lesson.sequence for lesson in lessons], batch, loss.value, self._config.train)
        self._found = self._found or found
        # a NaN reaches every rank's `_step`
        self.passes.backward(loss.value if found is None else loss.value * math.nan)
        means.add(loss.metrics)
        return float(loss.value.detach())
