"""`Trainer`: checks a config, builds the run and trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from e3rl.cluster.parallel import divides_weights
from e3rl.cluster.ranks import Ranks, join_ranks
from e3rl.cluster.rollouts import LocalRollouts, NoRollouts, Rollouts, remote_rollouts
from e3rl.config import Config
from e3rl.data.contamination import overlap_notes
from e3rl.data.stream import build_stream
from e3rl.engine.build import build_engine
from e3rl.engine.protocol import Engine
from e3rl.errors import RunStopped, UserError
from e3rl.evaluate.evaluation import Draws, evaluation_settings
from e3rl.files import write_json
from e3rl.models import Outline, Policy, load_outline, load_policy, resolve_model_path
from e3rl.objectives import build, method_name
from e3rl.objectives.base import Objective
from e3rl.rewards.scorer import Scorer, check_rewards_run
from e3rl.rollout.companions import find_companions
from e3rl.rollout.filters import build_filter
from e3rl.rollout.judge import needs_calibration, require_calibration
from e3rl.rollout.metric import load_metric, wants
from e3rl.rollout.statistics import CalibrationStatistics, measured_by
from e3rl.rollout.value import PRIOR
from e3rl.train.collect import Prefetch
from e3rl.train.journal import Journal, fingerprint
from e3rl.train.learner import Learner
from e3rl.train.listeners import Interrupted, Listener, StopRequest, tell
from e3rl.train.loop import train
from e3rl.train.packing import recurrent_mixers
from e3rl.train.prompts import RunData, answers_as_responses, load_data, number_of_steps
from e3rl.train.run_directory import RunDirectory, run_path
from e3rl.train.scoring import require_scorable
from e3rl.train.state import Run, State, publish_weights, restore, save
from e3rl.train.summary import environment, require_hub

RewardFunction = Callable[..., Any]

_CHECKPOINT_BYTES = 12  # of a trained number: itself and AdamW's two moments


class Trainer:
    """Trains one model from one config. Errors in the config are raised before the first step."""

    def __init__(
        self,
        config: Config,
        *,
        reward_functions: Sequence[RewardFunction] = (),
        listeners: Sequence[Listener] = (),
        resume: bool = False,
    ) -> None:
        self.run, self.state = prepare(config, reward_functions, listeners, resume)
        self.config, self.policy, self.run_path = self.run.config, self.run.policy, self.run.path

    def ask_to_stop(self) -> None:
        """Ask the run to stop where its state is whole, as Ctrl-C does."""
        self.run.stop.ask()

    def train(self) -> dict[str, Any]:
        """Run to the end and return the summary. Interrupted: the state is saved and RunStopped says how to go on."""
        run, state = self.run, self.state
        if run.ranks.first:
            write_json(self.run_path / "environment.json", environment())
        run.tell("started", self.run_path, run.config, method_name(run.config), state.step + 1, run.steps)
        if run.data.left_out:
            run.note(f"{run.data.left_out} training prompts are too long and left out; {len(run.data.train)} remain")
        for text in overlap_notes(run.config.data, run.data.train, run.data.held_out):
            run.note(text)
        if run.config.train.eval_steps and run.config.data.eval and not run.data.held_out:
            run.note("nothing is evaluated: data.eval names no held-out problems; they belong there")
        if state.step >= run.steps:
            run.note(f"all {run.steps} steps are done already; train.steps=N goes on to step N")
        if size := checkpoint_size(run):
            run.note(size)
        try:
            with run.ranks.guard(), run.stop, run.scorer:
                return train(run, state)
        except Interrupted:
            state.prefetched += run.prefetch.wait()  # prefetched steps belong to the state
            save(run, state)
            raise RunStopped(
                f"stopped after step {state.step} of {run.steps}; everything is saved in {self.run_path}. "
                "Go on with the same command and --resume."
            ) from None
        finally:
            run.prefetch.close()
            run.rollouts.close()
            if run.directory is not None:
                run.directory.release()


def checkpoint_size(run: Run) -> str:
    """A sentence on the disk space of checkpoints, where it is large."""
    numbers = sum(p.numel() for _, p in run.policy.trainable())
    gib = numbers * _CHECKPOINT_BYTES / 2**30
    if gib < 1:
        return ""
    keep = run.config.train.save_total_limit
    kept = f"{keep} are kept, {keep * gib:.1f} GiB" if keep else "all are kept"
    return f"a checkpoint takes about {gib:.1f} GiB (weights and AdamW's state in float32); {kept} (train.save_total_limit)"


def prepare(
    config: Config, reward_functions: Sequence[RewardFunction], listeners: Sequence[Listener], resume: bool
) -> tuple[Run, State]:
    """Build what the run works with; its state is that of a new run, or of the newest checkpoint with ``resume``."""
    ranks, path = join_ranks(config), run_path(config)
    resume = ranks.gather(resume)[0]
    remote = bool(config.rollout.workers or config.rollout.servers)
    note = partial(tell, listeners if ranks.first else (), "noted")
    _check_early(config, ranks, resume)
    objective = _build_objective(config)
    # what takes moments comes before the weights: data, columns, reward functions
    outline = load_outline(config.model)
    data = load_data(config, outline, shown="demonstrations" in objective.needs)
    scorer = _build_scorer(config, reward_functions, data, outline)
    steps = number_of_steps(config, len(data.train))
    torch.manual_seed(config.run.seed)  # adapters start equal in every run and rank
    divided = divides_weights(config.train, ranks)
    policy = load_policy(config.model, outline=outline, empty=divided)
    generating = _generating(config, policy, divided=divided, remote=remote)
    learner = _build_learner(policy, objective, config, steps, ranks, note)
    rollouts, draws, journal = _rollouts(config, generating, data.longest_prompt, path, note, remote, ranks.first)
    state = _first_state(config, data, learner)
    run = Run(
        config=config,
        path=path,
        directory=(RunDirectory.resume if resume else RunDirectory.create)(config) if ranks.first else None,
        data=data,
        steps=steps,
        policy=policy,
        generating=generating,
        learner=learner,
        draws=draws,
        rollouts=rollouts,
        remote=remote,
        scorer=scorer,
        keep=build_filter(config.filter),
        journal=journal,
        prefetch=Prefetch(ranks.apart() if config.rollout.staleness else ranks),
        ranks=ranks,
        asking=ranks.apart() if remote else ranks,
        stop=StopRequest(ranks),
        listeners=listeners if ranks.first else (),
    )
    if resume:
        restore(run, state)
    if remote or state.step:
        publish_weights(run, state)
    return run, state


def _check_early(config: Config, ranks: Ranks, resume: bool) -> None:
    """UserError for what can be seen to fail before data and model are loaded."""
    if ranks.first:
        RunDirectory.require(config, resume=resume)
    if config.train.push_to_hub and ranks.first:
        require_hub(config.train.push_to_hub)
    load_metric(config.erasure.metric)


def _generating(config: Config, policy: Policy, *, divided: bool, remote: bool) -> Policy:
    """The policy that rollouts are made by. An engine here needs weights that training does not touch or divide."""
    if remote:
        return policy.emptied() if divided else policy
    return policy.copied() if divided or config.rollout.staleness else policy


def _build_learner(
    policy: Policy, objective: Objective, config: Config, steps: int, ranks: Ranks, note: Callable[[str], None]
) -> Learner:
    """The learner; UserError where its packed rows don't give the model's own numbers."""
    updates = steps * config.train.num_iterations * config.train.minibatches
    learner = Learner(policy, objective, config, updates, ranks)
    require_scorable(policy.model, learner.passes)
    if mixers := recurrent_mixers(policy.model):
        note(
            f"{len(mixers)} layers carry a recurrent state: in training they run each sequence from its beginning, also what it "
            "shares with others; train.micro_batch_tokens counts that for each of them"
        )
    return learner


def _first_state(config: Config, data: RunData, learner: Learner) -> State:
    calibration = first_statistics(config, trains=not data.demonstrations, evaluates=bool(data.held_out))
    stream = build_stream(data.sources, config.data.sources, seed=config.run.seed)
    return State(learner.optimizer, stream, stream.state(), calibration)


def _rollouts(
    config: Config,
    policy: Policy,
    longest_prompt: int,
    path: Path,
    note: Callable[[str], None],
    remote: bool,
    first: bool,
) -> tuple[Rollouts, Engine | Draws, Journal | None]:
    """Where groups come from, in training and in evaluation, and the first rank's journal of them. With workers elsewhere, no
    engine is built."""
    if not remote:
        engine = build_engine(config.rollout, policy.model, policy.eos_ids, longest_prompt)
        journal = Journal(path, partial(fingerprint, policy.model), note) if first else None
        return LocalRollouts(engine, journal), engine, journal
    if not first:  # the first rank asks the workers
        return NoRollouts(policy), lambda _: iter(()), None
    journal = Journal(path, lambda: found.checksum(), note)
    found = remote_rollouts(config, policy, longest_prompt, journal, note)
    return found, found.draw, journal


def _build_objective(config: Config) -> Objective:
    """The objective; single samples are refused where it compares several."""
    objective = build(config.objective)
    if config.rollout.num_generations < 2 and not objective.needs & {"demonstrations", "frozen"}:
        raise UserError(
            f"rollout.num_generations = 1, but objective '{config.objective.name}' compares the samples of a prompt: "
            "it needs at least 2 samples of each"
        )
    return objective


def _build_scorer(config: Config, functions: Sequence[RewardFunction], data: RunData, outline: Outline) -> Scorer:
    """The scorer, after its functions were tried on two of the data's own answers.

    UserError for `math` where no problem has an answer: every reward would be missing.
    """
    asks = not functions and not data.demonstrations and "math" in config.rewards.functions
    if asks and not any(p.problem.answer for p in data.train):
        columns = sorted({name for p in data.train[:100] for name in p.problem.columns})
        raise UserError(
            f"reward 'math' compares with an answer, and no problem of {config.data.trained_on} has one in column "
            f"'{config.data.answer_column}' (data.answer_column). Its other columns: {', '.join(columns) or 'none'}"
        )
    limit = config.rollout.completion_limit
    scorer = Scorer(config.rewards, functions=functions, max_completion_length=limit)
    check_rewards_run(config.rewards, functions, *answers_as_responses(data.train[:2], outline), limit)
    return scorer


def first_statistics(config: Config, *, trains: bool, evaluates: bool) -> CalibrationStatistics:
    """Those saved beside the model where thresholds of this run come from them, else none yet.

    ``trains``: it learns from rollouts; ``evaluates``: it has held-out problems. UserError where statistics are missing, or
    were measured with other settings. A metric that learns goes on from what is saved beside the model.
    """
    learns = wants(load_metric(config.erasure.metric), "head")
    mine = CalibrationStatistics(measured_by(config.rollout, config.erasure), head=PRIOR if learns else None)
    judged = {"training": config} if trains and config.rollout.erase else {}
    if evaluates and config.eval.erasable:
        name = f"eval.erasable with eval.num_samples = {config.eval.num_samples}"
        judged[name] = evaluation_settings(config, erase=True)
    needing = {n: c for n, c in judged.items() if needs_calibration(c.rollout.num_generations, c.erasure)}
    if not needing and not learns:
        return mine
    saved = find_companions(resolve_model_path(config.model.path)).calibration
    for name, settings in needing.items():
        try:
            require_calibration(settings.rollout.num_generations, settings.erasure, saved)
            assert saved is not None
            saved.check(measured_by(settings.rollout, settings.erasure))
            if "training" in judged:  # adds what it sees to them
                saved.check(mine.settings)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    if not needing:
        return replace(mine, head=(saved and saved.head) or PRIOR)
    assert saved is not None
    return replace(saved, head=saved.head or PRIOR) if learns else saved
