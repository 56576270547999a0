"""`Scorer`: trajectories in, rewards out, for reward functions of any signature; their failures become missing rewards."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from e3rl.config import RewardsConfig
from e3rl.errors import UserError
from e3rl.plugins import load
from e3rl.reward_model import SequenceReward
from e3rl.rewards.adapters import LARGEST, Adapter, IsolatedFunction, RewardFunction, adapt, contained, describe
from e3rl.rewards.batch import Batch, BatchReward, Log, Part, TrainerState
from e3rl.rewards.builtin import REWARDS, MathReward
from e3rl.rewards.judge import JudgeReward
from e3rl.rewards.pool import ProcessPool
from e3rl.types import Reward, Trajectory


@dataclass
class Counters:
    """Counts so far: rewards asked for, rewards missing, and each function's failures and first error."""

    scored: int = 0
    missing: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first_errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Weighted:
    name: str
    weight: float
    call: Adapter


class Scorer:
    """The weighted sum of the config's reward functions, or of ``functions`` given in their place.

    Use it in a ``with`` block or call `close`: it may own worker processes, which start when they are first needed.
    ``unboxed``: what counts as the answer of a response without a box.
    ``log`` holds what the functions logged during the last `score`; ``trainer_state`` is passed to them.
    """

    def __init__(
        self,
        config: RewardsConfig,
        *,
        functions: Sequence[RewardFunction] = (),
        max_completion_length: int | None = None,
    ) -> None:
        self._limit = max_completion_length
        self.unboxed = config.unboxed
        self._pool = ProcessPool(config.workers, config.timeout)
        self._functions = _weighted(config, functions, self._pool)
        self.trainer_state = TrainerState()
        self.counters = Counters()
        self.log = Log()
        self._one_at_a_time = threading.Lock()  # evaluation and the prefetch thread may both call

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    @property
    def worker_restarts(self) -> int:
        """Workers that were killed or died so far."""
        return self._pool.restarts

    def score(self, trajectories: Sequence[Trajectory], texts: Sequence[str]) -> list[Reward]:
        """One reward for each trajectory; ``texts`` are the decoded responses. Never raises for a function's failure."""
        if len(trajectories) != len(texts):
            raise ValueError(f"{len(texts)} texts for {len(trajectories)} trajectories")
        if not trajectories:
            return []
        batch = Batch(tuple(trajectories), tuple(texts), self._limit, self.trainer_state)
        with self._one_at_a_time:
            self.log = Log()
            parts = [function.call(batch, self.log) for function in self._functions]
            rewards = [self._combine([column[i] for column in parts]) for i in range(len(batch))]
            rewards = [
                r if t.failure is None else Reward(None, r.parts, f"its environment {t.failure}")
                for r, t in zip(rewards, trajectories, strict=True)
            ]
            self.counters.scored += len(rewards)
            self.counters.missing += sum(reward.value is None for reward in rewards)
        return rewards

    def _combine(self, parts: Sequence[Part]) -> Reward:
        """TRL's sum over the functions that gave a value, unless one failed: then the reward is missing."""
        shown: dict[str, float | None] = {}
        failures: list[str] = []
        total: float | None = None
        for function, part in zip(self._functions, parts, strict=True):
            shown[function.name] = part.value
            if part.error is not None:
                failures.append(f"{function.name}: {part.error}")
                self.counters.errors[function.name] += 1
                self.counters.first_errors.setdefault(function.name, part.error)
            elif part.value is not None:
                total = (total or 0.0) + function.weight * part.value
        for function, part in zip(self._functions, parts, strict=True):
            shown |= {f"{function.name}/{name}": value for name, value in part.details.items()}
        if not failures and total is not None and not abs(total) <= LARGEST:
            failures.append(f"the weighted sum is {total:g}; a reward may be {LARGEST:g} at most")
        if failures:
            return Reward(None, shown, "; ".join(failures))
        return Reward(total, shown, None if total is not None else "no reward function gave a value")


def require_some(rewards: Sequence[Reward]) -> None:
    """UserError with the first failure if all rewards are missing: nothing is left to learn from."""
    if rewards and all(reward.value is None for reward in rewards):
        raise UserError(f"all {len(rewards)} rewards of this batch are missing. The first: {rewards[0].error}")


def _weighted(config: RewardsConfig, functions: Sequence[RewardFunction], pool: ProcessPool) -> list[_Weighted]:
    if functions and config.isolate:
        raise UserError("rewards.isolate needs functions that a worker can import: name them in rewards.functions")
    chosen: list[tuple[str, Adapter]]
    if functions:
        chosen = [(_name(function), _adapter(function, pool, config)) for function in functions]
    else:
        chosen = [_named(name, config, pool) for name in config.functions]
    weights = config.weights or (1.0,) * len(chosen)
    if len(weights) != len(chosen):
        raise UserError(f"rewards.weights has {len(weights)} values for {len(chosen)} reward functions")
    if config.overlong and "overlong" not in config.functions:
        chosen.append(_named("overlong", config, pool))
        weights = (*weights, 1.0)
    names = _distinct([name for name, _ in chosen])
    return [_Weighted(n, w, call) for n, w, (_, call) in zip(names, weights, chosen, strict=True)]


def _named(name: str, config: RewardsConfig, pool: ProcessPool) -> tuple[str, Adapter]:
    """A function of the config: its short name, and how to call it. Importing it here finds mistakes before the run."""
    function = load("reward", name, REWARDS)
    if not callable(function):
        raise UserError(f"reward '{name}' is {type(function).__name__}, not a function")
    apart = config.isolate and name not in REWARDS and not _is_batch_reward(function)
    return name.rpartition(":")[2], IsolatedFunction(name, pool) if apart else _adapter(function, pool, config)


def _is_batch_reward(function: Any) -> bool:
    return isinstance(function, type) and issubclass(function, BatchReward)


def _adapter(function: Any, pool: ProcessPool, config: RewardsConfig) -> Adapter:
    if function is MathReward:
        return _guarded(MathReward(pool, config.unboxed, config.cut_off_needs_box).score)
    if function is JudgeReward:
        return _guarded(JudgeReward(config.judge).score)
    if function is SequenceReward:
        return _guarded(SequenceReward(config.reward_model).score)
    if _is_batch_reward(function):
        return _guarded(function(pool).score)
    return adapt(function)


def _guarded(score: Callable[[Batch], list[Part]]) -> Adapter:
    def call(batch: Batch, log: Log) -> list[Part]:
        try:
            with contained():
                return score(batch)
        except Exception as error:  # importing user code may raise anything
            return [Part(error=describe(error))] * len(batch)

    return call


def _name(function: RewardFunction) -> str:
    inner = function.func if isinstance(function, functools.partial) else function
    return getattr(inner, "__name__", type(inner).__name__)


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, each repeated one with a number added."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return distinct


def broken(name: str, clause: str) -> UserError:
    """The error that names the reward function and the clause of the contract that it breaks."""
    return UserError(f"reward '{name}' breaks its contract: {clause}. See docs/extend.md.")


def check_rewards_run(
    config: RewardsConfig,
    functions: Sequence[RewardFunction],
    trajectories: Sequence[Trajectory],
    texts: Sequence[str],
    max_completion_length: int,
) -> None:
    """Call ``functions``, or the config's that are not built in, and refuse one that fails on all the responses.

    Failing on some is allowed: those rewards are missing. They run where the config says, isolated ones in a worker.
    """
    unweighted = dataclasses.replace(config, weights=())
    alone: list[tuple[str | None, Scorer]] = [
        (None, Scorer(unweighted, functions=(function,), max_completion_length=max_completion_length))
        for function in functions
    ]
    if not functions:
        outside = [name for name in config.functions if name not in REWARDS]
        alone = [
            (
                name,
                Scorer(dataclasses.replace(unweighted, functions=(name,)), max_completion_length=max_completion_length),
            )
            for name in outside
        ]
    for name, scorer in alone:
        with scorer:
            scorer.score(trajectories, texts)
        for short_name, count in scorer.counters.errors.items():
            if count == len(trajectories):
                raise broken(name or short_name, f"it {scorer.counters.first_errors[short_name]}")
