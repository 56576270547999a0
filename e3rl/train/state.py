"""What a run works with (`Run`), and what of it a checkpoint holds (`State`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from e3rl.cluster.parallel import Optimizer, divides_weights
from e3rl.cluster.ranks import Ranks
from e3rl.cluster.rollouts import Rollouts
from e3rl.config import Config
from e3rl.data.stream import Stream
from e3rl.engine.protocol import Engine
from e3rl.errors import UserError
from e3rl.evaluate.evaluation import Draws
from e3rl.models import Policy, load_policy
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.filters import GroupFilter
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.moments import Moments
from e3rl.rollout.statistics import CalibrationStatistics
from e3rl.train.checkpoint import Checkpoint, list_checkpoints, newest_checkpoint, save_checkpoint
from e3rl.train.collect import Prefetch, StepGroups, pack_groups, unpack_groups
from e3rl.train.journal import Journal
from e3rl.train.learner import Learner
from e3rl.train.listeners import Listener, StopRequest, tell
from e3rl.train.nonfinite import nonfinite_parameters
from e3rl.train.prompts import RunData
from e3rl.train.run_directory import RunDirectory, read_lines
from e3rl.weights.files import describe_checkpoint
from e3rl.weights.model import take_weights


@dataclass(frozen=True)
class Run:
    """Settings, data, and who does the work. ``Trainer`` builds it; `e3rl.train.loop` uses it."""

    config: Config
    path: Path  # the run's directory, which the first rank writes and the others read
    directory: RunDirectory | None  # the first rank alone writes to it, but for shares of checkpoints
    data: RunData
    steps: int
    policy: Policy  # what is trained
    generating: Policy
    """What rollouts are made by: the same, a copy that `publish_weights` brings up to date, or, where they are made elsewhere
    and no rank has the weights whole, an empty one."""
    learner: Learner
    draws: Engine | Draws  # what evaluation draws by
    rollouts: Rollouts
    remote: bool  # whether workers elsewhere make them
    scorer: Scorer
    keep: GroupFilter
    journal: Journal | None  # the first rank's: others begin again with it
    prefetch: Prefetch
    ranks: Ranks
    asking: Ranks  # the same, for what the first rank asks of workers while the others wait
    stop: StopRequest
    listeners: Sequence[Listener]  # only the first rank has some

    def tell(self, event: str, *values: Any) -> None:
        """See `e3rl.train.listeners.tell`."""
        tell(self.listeners, event, *values)

    def note(self, text: str) -> None:
        """Tell the user something."""
        self.tell("noted", text)


@dataclass
class State:
    """Where a run stands. A checkpoint holds exactly this, and PyTorch's random numbers."""

    optimizer: Optimizer  # float32 weights, AdamW's moments
    stream: Stream  # what `collect` takes prompts from
    position: Mapping[str, Any]  # where it stood after the last groups that are here
    calibration: CalibrationStatistics  # of all first candidates so far
    entropy_moments: Moments | None = None  # of the step before
    prefetched: list[StepGroups] = field(default_factory=list)  # collected for the next steps already
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0  # steps skipped in a row because of non-finite numbers


def version(run: Run, state: State) -> int:
    """Optimizer updates so far: which weights generate now."""
    return state.step * run.learner.updates_per_step()


def group_settings(run: Run, state: State, step: int) -> GroupSettings:
    """What the rollouts for ``step`` depend on beside their prompts, as things are now."""
    config = run.config
    return GroupSettings(
        config.rollout,
        config.erasure,
        config.run.seed,
        step=step,
        policy_version=version(run, state),
        calibration=state.calibration,
        entropy_moments=state.entropy_moments,
    )


def publish_weights(run: Run, state: State) -> None:
    """Give the trained weights to whatever generates."""
    divided = divides_weights(run.config.train, run.ranks)
    weights = state.optimizer.weights() if divided else dict(run.policy.trainable())
    with run.rollouts.paused():
        if not run.remote and run.generating is not run.policy:
            take_weights(run.generating.model, weights)
        run.rollouts.load_weights(version(run, state), weights)


def whole_policy(run: Run, state: State) -> Policy | None:
    """The policy with all its weights, in the first rank. Where no rank has them, it reads the model once more, on the host."""
    first = run.ranks.first
    if not (run.remote and divides_weights(run.config.train, run.ranks)):
        return run.generating if first else None
    on_host = replace(run.config.model, device="cpu")
    policy = run.ranks.attempt(lambda: load_policy(on_host) if first else None)
    if policy is not None:
        take_weights(policy.model, state.optimizer.weights())
    else:
        deque(state.optimizer.weights().values(), maxlen=0)
    return policy


def require_finite_weights(run: Run, after: str) -> None:
    """UserError, in every rank, where a weight that is trained is NaN or infinite: nothing is saved or published then."""
    named = run.ranks.gather(nonfinite_parameters(run.policy.model))
    if bad := sorted(set().union(*named)):
        raise UserError(
            f"{after}, {len(bad)} parameters hold NaN or infinite numbers ({bad[0]} for one): nothing of it is saved. "
            f"The newest checkpoint in {run.path / 'checkpoints'} is from before; start again with a lower "
            "train.learning_rate or train.weight_decay"
        )


def save(run: Run, state: State) -> None:
    """Write a checkpoint; the journals of the steps that it holds are no longer needed."""
    require_finite_weights(run, f"at step {state.step}")
    ahead, prefetched = pack_groups(state.prefetched)
    lines = read_lines(run.path / "evaluations.jsonl") if run.directory is not None else []
    facts = {
        "stream": (state.prefetched[-1] if state.prefetched else state).position,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "skipped": state.skipped,
        "reference": state.calibration.to_tables(),
        "entropy_moments": state.entropy_moments and state.entropy_moments.to_table(),
        "ahead": ahead,
        "evaluations": sum(r["step"] < state.step for r in lines),  # that of this step is made again if need be
    }
    weights, moments = state.optimizer.weights(), state.optimizer.state()
    checkpoint = Checkpoint(
        state.step, weights, moments, torch.get_rng_state(), facts, prefetched, partial(describe_checkpoint, run.policy)
    )
    save_checkpoint(run.path, checkpoint, run.config.train.save_total_limit, run.ranks)
    if run.journal is not None:
        run.journal.drop_through(state.step)


def restore(run: Run, state: State) -> None:
    """Go on from the newest intact checkpoint; from the beginning where a run was stopped before its first."""
    evaluations = 0
    if list_checkpoints(run.path):
        checkpoint = newest_checkpoint(run.path, run.note, run.ranks)
        facts, moments = checkpoint.facts, checkpoint.facts["entropy_moments"]
        evaluations = facts.get("evaluations", 0)
        state.step, state.tokens, state.seconds = checkpoint.step, facts["tokens"], facts["seconds"]
        state.skipped = facts.get("skipped", 0)
        state.optimizer.load(checkpoint.weights, checkpoint.optimizer)
        torch.set_rng_state(checkpoint.rng)
        state.stream.restore(facts["stream"])
        state.position = facts["stream"]
        state.calibration = CalibrationStatistics.from_tables(facts["reference"])
        state.entropy_moments = moments and Moments.from_table(moments)
        state.prefetched = unpack_groups(run, facts.get("ahead") or [], checkpoint.prefetched)
        if run.journal is not None:
            run.journal.drop_through(state.step)
    if run.directory is not None:
        run.directory.drop_after(state.step, run.note, evaluations)
