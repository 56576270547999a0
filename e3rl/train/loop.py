"""The run: rollouts, rewards, learning, evaluation and checkpoints, in that order, step after step.

It reads top to bottom as the data's way; everything about tensors is the learner's, everything about caches the
engine's, and the algorithm is the objective's.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from e3rl.cluster.parallel import divides_weights
from e3rl.cluster.rollouts import build_rollouts
from e3rl.cluster.together import SharedRollouts, SharedScorer, Together
from e3rl.config import Config
from e3rl.data.contamination import overlap_notes
from e3rl.data.stream import PromptStream
from e3rl.engine.build import build_engine
from e3rl.engine.weights import take_weights
from e3rl.errors import RunStopped, UserError
from e3rl.evaluate.evaluation import held_out_records
from e3rl.files import atomic_directory, write_json
from e3rl.models import load_policy, save_pretrained
from e3rl.objectives import build as build_objective
from e3rl.objectives import method_name
from e3rl.objectives.base import Objective
from e3rl.rewards.checks import check_rewards_run
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.companions import save_companions
from e3rl.rollout.filters import build_filter
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.metric import load_metric
from e3rl.rollout.moments import Moments
from e3rl.rollout.statistics import ReferenceStatistics, entropy_moments
from e3rl.train.checkpoint import Checkpoint, list_checkpoints, newest_checkpoint, save_checkpoint
from e3rl.train.collector import Ahead, Collector, Hooks
from e3rl.train.demonstrations import answers_as_responses, demonstrations
from e3rl.train.environment import environment
from e3rl.train.interrupt import Interrupted, StopRequest
from e3rl.train.journal import Journal, fingerprint
from e3rl.train.learner import Learner, Lesson
from e3rl.train.ledger import learnt, ledger_rows, write_ledger
from e3rl.train.listeners import Listener
from e3rl.train.model_card import model_card
from e3rl.train.prompts import load_prompts, number_of_steps
from e3rl.train.reference import first_reference
from e3rl.train.run_directory import RunDirectory, read_lines, run_path
from e3rl.train.scoring import require_scorable
from e3rl.train.skipped import SickBook
from e3rl.train.step_metrics import StepTimes, staleness, step_record
from e3rl.train.summary import run_summary
from e3rl.types import RewardedGroup

RewardFunction = Callable[..., Any]


def _require_siblings(config: Config, objective: Objective) -> None:
    """Refuse single samples where the objective compares several."""
    if config.rollout.num_generations < 2 and not objective.needs & {"demonstrations", "frozen"}:
        raise UserError(
            f"rollout.num_generations = 1, but objective '{config.objective.name}' compares the samples of a prompt: "
            "it needs at least 2 samples of each"
        )


class Trainer:
    """Trains one model from one config. Everything that can be wrong with the config is found before the first step."""

    def __init__(
        self,
        config: Config,
        *,
        reward_functions: Sequence[RewardFunction] = (),
        listeners: Sequence[Listener] = (),
        resume: bool = False,
    ) -> None:
        self._together = Together.of(config)
        self._ranks = self._together.ranks
        config, resume = self._together.own(config, resume)
        self.config, self._listeners = config, list(listeners) if self._ranks.first else []
        objective = build_objective(config.objective)
        _require_siblings(config, objective)
        torch.manual_seed(config.run.seed)  # adapters begin alike, in every run and every rank
        self.policy = load_policy(config.model)
        require_scorable(self.policy.model)
        self._train_prompts, self._held_out = load_prompts(config, self.policy)
        shown = "demonstrations" in objective.needs
        self._demonstrations = demonstrations(self._train_prompts, self.policy, config) if shown else {}
        self.steps = number_of_steps(config, len(self._train_prompts))
        self._generating = self.policy
        # rollouts need weights that training does not touch or divide
        if config.rollout.ahead or divides_weights(config.train, self._ranks):
            self._generating = replace(self.policy, model=copy.deepcopy(self.policy.model))
        updates = self.steps * config.train.num_iterations * config.train.minibatches
        self._learner = Learner(self.policy, objective, config, updates, self._ranks)
        model = self._generating.model
        self._engine = build_engine(config.rollout, model, self.policy.eos_ids, self._longest_prompt())
        self._journal = Journal(run_path(config), lambda: fingerprint(model), self._note)
        rollouts = build_rollouts(
            config, self._generating, self._engine, self._longest_prompt(), self._journal, self._note
        )
        self._rollouts = SharedRollouts(rollouts, self._together)
        limit = config.rollout.completion_limit
        self._scorer = Scorer(config.rewards, functions=reward_functions, max_completion_length=limit)
        load_metric(config.erasure.metric)
        answers = answers_as_responses(self._train_prompts[:2], self.policy)
        check_rewards_run(config.rewards, reward_functions, *answers, limit)
        self._stream = PromptStream(self._train_prompts, seed=config.run.seed)
        self._collector = self._new_collector()
        self._ahead = Ahead(self._collector)
        self._step, self._tokens, self._seconds = 0, 0, 0.0
        self._reference = first_reference(config, trains=not self._demonstrations, evaluates=bool(self._held_out))
        self._entropy_moments: Moments | None = None
        self.stop_request = StopRequest(self._ranks)
        self.directory = RunDirectory.resume(config) if resume and self._ranks.first else RunDirectory.create(config)
        self._sick_book = SickBook(self.run_path, self._together.path, config.train.max_skipped_steps, self._note)
        if resume:
            self._restore()

    def _new_collector(self) -> Collector:
        return Collector(
            self.config,
            self._generating,
            self._stream,
            self._rollouts,
            SharedScorer(self._scorer, self._ranks),
            build_filter(self.config.filter),
            demonstrations=self._demonstrations,
            prompts={prompt.problem.id: prompt for prompt in self._train_prompts},
            hooks=Hooks(lambda: self.stop_request.check(), self._tell),
        )

    @property
    def run_path(self) -> Path:
        return self.directory.path

    def _longest_prompt(self) -> int:
        return max(len(p.ids) for prompts in (self._train_prompts, *self._held_out.values()) for p in prompts)

    def train(self) -> dict[str, Any]:
        """Run to the end and return the summary. Interrupted: the state is saved and RunStopped says how to go on."""
        first = self._step + 1
        write_json(self.run_path / "environment.json", environment())
        self._tell("started", self.run_path, self.config, method_name(self.config), first, self.steps)
        for text in overlap_notes(self.config.data, self._train_prompts, self._held_out):
            self._note(text)
        if self.config.train.eval_steps and not self._held_out:
            self._note("nothing is evaluated: data.eval is empty, though train.eval_steps is set")
        try:
            with self._ranks.guard(), self.stop_request, self._scorer:
                if self._step == 0 or self._due(self.config.train.eval_steps):
                    self._evaluate()
                if self._step == 0:
                    self._save()
                while not self._done():
                    self._one_step()
                return self._finish()
        except Interrupted:
            self._save()
            raise RunStopped(
                f"stopped after step {self._step} of {self.steps}; everything is saved in {self.run_path}. "
                "Go on with the same command and --resume."
            ) from None
        finally:
            self._ahead.close()
            self._rollouts.close()
            self.directory.release()

    def _one_step(self) -> None:
        """Prompts to a better policy. Nothing of the run's state changes before the optimizer has."""
        position, restarts = self._stream.state(), self._scorer.worker_restarts
        try:
            harvest = self._ahead.take() or self._collector.collect(self._assignment(self._step + 1))
        except Interrupted:
            self._stream.restore(position)
            raise
        collected, epochs, version = harvest.collected, self._stream.epochs, self._version
        if self.config.rollout.ahead and self._step + 1 < self.steps:
            self._ahead.start(self._assignment(self._step + 2))
        began = time.perf_counter()
        lessons, update = self._sick_book.learn(self._learner, collected.kept, version, self._step + 1)
        self._step += 1
        seconds = StepTimes(harvest.rollout_seconds, harvest.reward_seconds, time.perf_counter() - began)
        self._ahead.wait()
        self._publish_weights()
        record = step_record(self._step, epochs, collected, lessons, update, seconds, self._tokens)
        record["reward_restarts"] = self._scorer.worker_restarts - restarts
        record["skipped"] = int(math.isnan(update.grad_norm))
        record["staleness"] = staleness(collected.all, version)
        self._record(collected.all, lessons, record)
        if self._due(self.config.train.eval_steps) and not self._done():
            self._evaluate()
        if self._due(self.config.train.save_steps) or self._done():
            self._save()
        self.stop_request.check_together()

    def _assignment(self, step: int) -> GroupSettings:
        """What the rollouts for a step depend on beside their prompts, as things are now."""
        return GroupSettings(
            self.config.rollout,
            self.config.erasure,
            self.config.run.seed,
            step=step,
            policy_version=self._version,
            reference=self._reference,
            entropy_moments=self._entropy_moments,
        )

    @property
    def _version(self) -> int:
        """Optimizer updates before this step."""
        return self._step * self._learner.updates_per_step()

    def _publish_weights(self) -> None:
        """Whoever generates takes the weights that are trained."""
        if self._generating is not self.policy:
            take_weights(self._generating.model, self._learner.optimizer.weights())
        self._rollouts.load_weights(self._version)

    def _record(self, rewarded: Sequence[RewardedGroup], lessons: Sequence[Lesson], record: dict[str, Any]) -> None:
        """Put a step that is done on disk and tell the listeners."""
        rows = ledger_rows(self._step, rewarded, learnt(rewarded, lessons), self.policy.tokenizer)
        write_ledger(self.run_path, self._step, rows)
        self._tokens = record["tokens_total"]
        self._seconds += record["seconds_rollout"] + record["seconds_reward"] + record["seconds_train"]
        groups = [item.group for item in rewarded]
        self._reference = self._reference.including(groups)
        self._entropy_moments = entropy_moments(groups)
        self.directory.append("metrics.jsonl", record)
        self._tell("stepped", record)

    def _done(self) -> bool:
        budget = self.config.train.max_tokens
        return self._step >= self.steps or 0 < budget <= self._tokens

    def _due(self, every: int) -> bool:
        return every > 0 and self._step % every == 0

    def _evaluate(self) -> None:
        """Evaluate on the held-out problems, plain and, where asked for, erasable; what a resumed run has is kept."""
        if not self._held_out or not self._ranks.first:
            return
        done = [r for r in read_lines(self.run_path / "evaluations.jsonl") if r["step"] == self._step]
        for found in held_out_records(
            self._engine,
            self._held_out,
            self._scorer,
            self.policy.tokenizer,
            self.config,
            reference=self._reference,
            done=done,
        ):
            record = {"step": self._step, **found}
            self.directory.append("evaluations.jsonl", record)
            self._tell("evaluated", record)
            self.stop_request.check()

    def _save(self) -> None:
        facts = {
            "stream": self._stream.state(),
            "tokens": self._tokens,
            "seconds": self._seconds,
            "reference": self._reference.to_tables(),
            "entropy_moments": self._entropy_moments and self._entropy_moments.to_table(),
            "ahead": self._ahead.harvest and self._collector.to_table(self._ahead.harvest),
        }
        optimizer = self._learner.optimizer
        checkpoint = Checkpoint(self._step, optimizer.weights(), optimizer.state(), torch.get_rng_state(), facts)
        save_checkpoint(self._together.path, checkpoint, self.config.train.save_total_limit, self._ranks)
        self._journal.drop_through(self._step)

    def _restore(self) -> None:
        if not list_checkpoints(self._together.path):  # stopped before the first one: all is still to be done
            self.directory.drop_after(0)
            return
        checkpoint = newest_checkpoint(self._together.path, self._note, self._ranks)
        self._step = checkpoint.step
        self._learner.optimizer.load(checkpoint.weights, checkpoint.optimizer)
        torch.set_rng_state(checkpoint.rng)
        facts = checkpoint.facts
        self._stream.restore(facts["stream"])
        self._tokens, self._seconds = facts["tokens"], facts["seconds"]
        self._reference = ReferenceStatistics.from_tables(facts["reference"])
        moments = facts["entropy_moments"]
        self._entropy_moments = moments and Moments.from_table(moments)
        if facts.get("ahead"):
            self._ahead.harvest = self._collector.from_table(facts["ahead"])
        self._publish_weights()
        self.directory.drop_after(self._step)
        self._journal.drop_through(self._step)

    def _finish(self) -> dict[str, Any]:
        """The last evaluation, the model as an ordinary directory, and the summary."""
        if not self._ranks.first:
            return {}
        self._evaluate()
        summary = run_summary(self.run_path, self.config, step=self._step, seconds=self._seconds, tokens=self._tokens)
        with atomic_directory(self.run_path / "model") as temporary:
            card = model_card(self.config, summary, has_statistics=bool(self._reference.segments))
            save_pretrained(self._generating, temporary, card)
            save_companions(temporary, self.config, self._reference)
        write_json(self.run_path / "summary.json", summary)
        self._tell("finished", summary)
        return summary

    def _note(self, text: str) -> None:
        self._tell("noted", text)

    def _tell(self, event: str, *values: Any) -> None:
        for listener in self._listeners:
            getattr(listener, event)(*values)
