"""The training loop: rollouts, rewards, learning, evaluation and checkpoints, step after step.

`train` is a whole run and `step` is one step of it. Tensors belong to the learner (`e3rl.train.learner`), KV caches to the
engine (`e3rl.engine`), the algorithm to the objective (`e3rl.objectives`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from e3rl.evaluate.evaluation import held_out_records
from e3rl.files import atomic_directory, write_json
from e3rl.rollout.companions import save_companions
from e3rl.rollout.statistics import entropy_moments
from e3rl.train.collect import Arriving, StepGroups, collect, streams
from e3rl.train.ledger import ledger_rows, write_ledger
from e3rl.train.lessons import Lesson
from e3rl.train.metrics import Update
from e3rl.train.nonfinite import NonFiniteNumbers, skip_step
from e3rl.train.run_directory import read_lines
from e3rl.train.state import (
    Run,
    State,
    group_settings,
    publish_weights,
    require_finite_weights,
    save,
    version,
    whole_policy,
)
from e3rl.train.step_metrics import sampled_text, step_record
from e3rl.train.summary import model_card, run_summary, upload
from e3rl.weights.files import save_adapter, save_pretrained


def train(run: Run, state: State) -> dict[str, Any]:
    """Train to the end and return the summary. `Interrupted` leaves ``state`` as it was after the last whole step."""
    if state.step == 0 or due(state, run.config.train.eval_steps):
        evaluate_policy(run, state)
    if state.step == 0:
        save(run, state)
    while not done(run, state):
        step(run, state)
    return finish(run, state)


def step(run: Run, state: State) -> None:
    """One training step: prompts → groups → rewards → lessons → update → record → save.

    All ranks run the same lines; rank 0 does the output. Until the weights have changed nothing of ``state``
    does, so a stop leaves a state that the run can go on from.
    """
    settings, number, restarts = run.config.train, state.step + 1, run.scorer.worker_restarts

    # prompts → groups → rewards, here or in the thread that collects steps before their time
    coming, updates = next_groups(run, state, number), version(run, state)
    prefetch(run, state, number)

    # rewards → lessons → update; a step with non-finite numbers changes no weight
    run.tell("progressed", "training", 0, 0)
    began = time.perf_counter()
    groups, lessons, update = learn_or_skip(run, state, coming, updates, number)
    seconds = time.perf_counter() - began - (coming.waited if isinstance(coming, Arriving) else 0.0)
    state.position = groups.position
    require_finite_weights(run, f"after step {number}")
    state.step = number

    # with rollout.staleness = 1 the next step's rollouts end under their weights, so that a run can be repeated
    waits = run.config.rollout.staleness == 1
    state.prefetched += run.prefetch.wait() if waits else run.prefetch.finished(run.ranks)
    publish_weights(run, state)

    line = step_record(
        number,
        groups,
        lessons,
        update,
        version=updates,
        train_seconds=seconds,
        tokens_before=state.tokens,
        reward_restarts=run.scorer.worker_restarts - restarts,
    )
    record(run, state, groups, lessons, line)

    if due(state, settings.eval_steps) and not done(run, state):
        evaluate_policy(run, state)
    if due(state, settings.save_steps) or done(run, state):
        save(run, state)
    run.stop.check_together()


def learn_or_skip(
    run: Run, state: State, coming: StepGroups | Arriving, updates: int, number: int
) -> tuple[StepGroups, list[Lesson], Update]:
    """Learn from the groups, of a step that is not complete as they come. With non-finite numbers the step is skipped: kept for
    replay, and no weight changes."""
    try:
        if isinstance(coming, Arriving):
            lessons, update = run.learner.learn_arriving(coming, updates)
        else:
            lessons, update = run.learner.learn(coming.kept, updates)
    except NonFiniteNumbers as found:
        groups = coming.whole()
        weights, limit = state.optimizer.weights(), run.config.train.max_skipped_steps
        text = skip_step(
            run.path, found, number, groups.kept, weights, before=state.skipped, limit=limit, writes=run.ranks.first
        )
        run.note(text)
        state.skipped += 1
        return groups, [], Update({}, math.nan, 0.0)
    state.skipped = 0
    return coming.whole(), lessons, update


def next_groups(run: Run, state: State, number: int) -> StepGroups | Arriving:
    """The step's groups: collected already, under way in the thread, or collected here."""
    if state.prefetched:
        return state.prefetched.pop(0)
    if not len(run.prefetch):
        return collect(run, state.stream, group_settings(run, state, number), run.stop.check)
    arriving = run.prefetch.next()
    return arriving if streams(run) else arriving.whole()


def prefetch(run: Run, state: State, number: int) -> None:
    """Begin to collect up to ``rollout.staleness`` steps after this one, so that no rollout is more updates old than that."""
    begun = number + len(state.prefetched) + len(run.prefetch)
    for step in range(begun + 1, min(number + run.config.rollout.staleness, run.steps) + 1):
        run.prefetch.start(run, state.stream, group_settings(run, state, step))


def record(run: Run, state: State, groups: StepGroups, lessons: Sequence[Lesson], line: dict[str, Any]) -> None:
    """Write a step (ledger, then metrics), update the totals in ``state`` and tell the listeners."""
    if run.directory is not None:
        rows = ledger_rows(state.step, groups.all, lessons, run.policy.tokenizer)
        write_ledger(run.path, state.step, rows)
    state.tokens = line["tokens_total"]
    state.seconds += line["seconds_rollout"] + line["seconds_reward"] + line["seconds_train"]
    generated = [item.group for item in groups.all]
    state.calibration = state.calibration.including(generated).taught(groups.all)
    state.entropy_moments = entropy_moments(generated)
    if run.directory is not None:
        run.directory.append("metrics.jsonl", line)
    run.tell("stepped", line)
    if due(state, run.config.train.show_steps):
        run.note(sampled_text(groups.all[0], run.policy.tokenizer))


def done(run: Run, state: State) -> bool:
    """Whether all steps are done or the token budget is spent."""
    return state.step >= run.steps or 0 < run.config.train.max_tokens <= state.tokens


def due(state: State, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one; 0 is never."""
    return every > 0 and state.step % every == 0


def evaluate_policy(run: Run, state: State) -> None:
    """Evaluate on the held-out problems, plain and, where asked for, erasable; what a resumed run has is kept.

    Every rank draws and grades a share, or, where workers generate, the first one asks them and the others wait.
    """
    if run.data.held_out and run.remote:
        run.asking.while_first(partial(_evaluate, run, state))
    elif run.data.held_out:
        _evaluate(run, state)


def _evaluate(run: Run, state: State) -> None:
    run.tell("progressed", "evaluating", 0, 0)
    lines = read_lines(run.path / "evaluations.jsonl") if run.directory else []
    present = [r for r in lines if r["step"] == state.step]
    with run.rollouts.paused():
        for figures in held_out_records(
            run.draws,
            run.data.held_out,
            run.scorer,
            run.policy.tokenizer,
            run.config,
            calibration=state.calibration,
            done=present if run.remote else run.ranks.gather(present)[0],
            peers=None if run.remote else run.ranks,
        ):
            if run.directory is not None:
                line = {"step": state.step, **figures}
                run.directory.append("evaluations.jsonl", line)
                run.tell("evaluated", line)
            run.stop.check()


def finish(run: Run, state: State) -> dict[str, Any]:
    """The last evaluation, the model as a Hugging Face directory, and the summary."""
    evaluate_policy(run, state)
    policy, path = whole_policy(run, state), run.path
    if policy is None:
        return {}
    config = run.config
    summary = run_summary(path, config, step=state.step, seconds=state.seconds, tokens=state.tokens)
    with atomic_directory(path / "model") as temporary:
        card = model_card(config, summary, has_statistics=bool(state.calibration.segments))
        save_pretrained(policy, temporary, card)
        save_companions(temporary, config, state.calibration)
    if config.model.lora_r:
        with atomic_directory(path / "adapter") as temporary:
            save_adapter(policy, temporary, card)
    write_json(path / "summary.json", summary)
    if config.train.push_to_hub:
        run.note(f"uploading the model to {config.train.push_to_hub}")
        run.note(upload(path / "model", path / "adapter", config.train.push_to_hub))
    run.tell("finished", summary)
    return summary
