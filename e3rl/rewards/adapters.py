"""Calls users' reward functions unchanged: TRL's and verl's signatures, sync or async, in this process or isolated."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import math
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from e3rl.errors import where_raised
from e3rl.plugins import ProcessState, load
from e3rl.rewards.batch import Batch, Log, Part
from e3rl.rewards.pool import Outcome, PooledCall, ProcessPool
from e3rl.types import Problem

RewardFunction = Callable[..., Any]

LARGEST = 1e15
"""The largest reward: larger ones overflow the advantages."""

_VERL_PARAMETERS = {"solution_str", "ground_truth"}


class Adapter(Protocol):
    """A reward function of any signature behind one interface. Never raises: a failure becomes the part's error."""

    def __call__(self, batch: Batch, log: Log) -> list[Part]: ...


def adapt(function: RewardFunction) -> Adapter:
    """TRL's signature, or verl's where the parameters are named as verl names them."""
    return VerlFunction(function) if parameters(function).keys() >= _VERL_PARAMETERS else TrlFunction(function)


def parameters(function: RewardFunction) -> Mapping[str, inspect.Parameter]:
    """A function's parameters by name; those of one that can't be inspected count as ``**kwargs``."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def describe(error: BaseException) -> str:
    """An exception in one line, with the line of the user's code that raised it."""
    return (
        str(error)
        if isinstance(error, Misbehaviour)
        else f"raised {type(error).__name__}: {error}{where_raised(error)}"
    )


def _to_part(value: Any) -> Part:
    """A returned value as a part: None is no opinion, a number is the value, anything else is an error."""
    if value is None:
        return Part()
    if isinstance(value, Exception):
        return Part(error=describe(value))
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return Part(error=f"returned {type(value).__name__}, not a number")
    try:
        number = float(value)
    except Exception as error:
        return Part(error=f"returned what is not a number: {error}")
    if not math.isfinite(number):
        return Part(error=f"returned {number}")
    if abs(number) > LARGEST:
        return Part(error=f"returned {number:g}; a reward may be {LARGEST:g} at most")
    return Part(number)


# --- guards: what a function must not do to its process


class Misbehaviour(Exception):
    """A reward function tried to end the process or moved it to another directory."""


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Guards user code: ``sys.exit`` becomes an error, a changed working directory is restored and reported, and a forked
    child that returns is ended here, so that it doesn't continue as a second run."""
    process, before = os.getpid(), ProcessState.now()
    try:
        yield
    except SystemExit as error:
        raise Misbehaviour(f"called sys.exit({'' if error.code is None else error.code})") from error
    finally:
        if os.getpid() != process:
            sys.stderr.write("e3rl: a reward function forked and its child returned; the child ends here\n")
            sys.stderr.flush()
            os._exit(70)
        if said := before.restore():
            raise Misbehaviour(said)


# --- asynchronous functions
#
# One event loop in its own thread for the life of the process: clients that a user's module keeps between calls are bound
# to the loop that made them, and the caller may already be inside a loop (a notebook).


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="e3rl-async-rewards", daemon=True).start()
    return loop


async def _one(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except SystemExit as error:  # it would end the loop's thread
        raise Misbehaviour(f"called sys.exit({error.code})") from error


async def _gather(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*map(_one, awaitables), return_exceptions=True)


def wait_for_all(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """Run all concurrently and return each one's result, or the exception that it raised."""
    future = asyncio.run_coroutine_threadsafe(_gather(awaitables), _loop())
    try:
        return future.result()
    except BaseException:  # Ctrl-C while waiting: cancel what still runs
        future.cancel()
        raise


# --- TRL's signature, and verl's


class TrlFunction:
    """``f(prompts, completions, completion_ids, **columns) -> list[float | None]``.

    The function gets the arguments that its signature names, or all if it takes ``**kwargs``. ``trainer_state``,
    ``log_metric`` and ``log_extra`` are TRL's; ``trajectories`` and ``max_completion_length`` are passed only if named.
    """

    def __init__(self, function: RewardFunction) -> None:
        self._function = function
        named = parameters(function)
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in named.values())
        ordinary = {n: p for n, p in named.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        self._names = set(ordinary)
        self._required = {n for n, p in ordinary.items() if p.default is p.empty}

    def __call__(self, batch: Batch, log: Log) -> list[Part]:
        try:
            with contained():
                returned = self._function(**self._arguments(batch, log))
                if inspect.isawaitable(returned):
                    (returned,) = wait_for_all([returned])
            if isinstance(returned, Exception):
                raise returned
            return _to_parts(returned, len(batch))
        except Exception as error:  # the user's code may raise anything
            return [Part(error=describe(error))] * len(batch)

    def _arguments(self, batch: Batch, log: Log) -> dict[str, Any]:
        usual = {
            **batch.columns,
            "prompts": batch.prompts,
            "completions": batch.completions,
            "completion_ids": [t.ids.tolist() for t in batch.trajectories],
            "trainer_state": batch.trainer_state,
            "log_metric": log.log_metric,
            "log_extra": log.log_extra,
        }
        own: dict[str, Any] = {
            "trajectories": list(batch.trajectories),
            "environments": [t.environment for t in batch.trajectories],
        }
        if batch.max_completion_length is not None:
            own["max_completion_length"] = batch.max_completion_length
        known = {**usual, **own}
        absent = sorted(self._required - known.keys())
        if absent:
            raise LookupError(f"it needs {', '.join(absent)}; the data has the columns {', '.join(batch.columns)}")
        return {n: v for n, v in known.items() if n in self._names or (self._takes_all and n in usual)}


def _to_parts(returned: Any, count: int) -> list[Part]:
    if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Iterable):
        return [Part(error=f"returned {type(returned).__name__}, not a list of {count} numbers")] * count
    values = list(returned)
    if len(values) != count:
        return [Part(error=f"returned {len(values)} values for {count} completions")] * count
    return [_to_part(value) for value in values]


class VerlFunction:
    """``compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | dict``, one call for each completion.

    In a returned dict, ``score`` is the value and the other numbers are details. The ground truth is the problem's answer,
    or ``reward_model["ground_truth"]`` as in verl's own data.
    """

    def __init__(self, function: RewardFunction) -> None:
        self._function = function
        self._names = set(parameters(function))

    def __call__(self, batch: Batch, log: Log) -> list[Part]:
        returned = [self._start(p, text) for p, text in zip(batch.problems, batch.texts, strict=True)]
        pending = [i for i, value in enumerate(returned) if inspect.isawaitable(value)]
        try:
            with contained():
                arrived = wait_for_all([returned[i] for i in pending]) if pending else []
        except Misbehaviour as error:
            arrived = [error] * len(pending)
        for i, value in zip(pending, arrived, strict=True):
            returned[i] = value
        return [_verl_part(value) for value in returned]

    def _start(self, problem: Problem, text: str) -> Any:
        """What the function returns, or the exception that it raises."""
        try:
            columns = problem.columns
            known = {
                "data_source": columns.get("data_source", ""),
                "solution_str": text,
                "ground_truth": _ground_truth(problem),
                "extra_info": columns.get("extra_info", dict(columns)),
            }
            with contained():
                return self._function(**{name: value for name, value in known.items() if name in self._names})
        except Exception as error:  # the user's code may raise anything
            return error


def _ground_truth(problem: Problem) -> Any:
    if problem.answer is not None:
        return problem.answer
    nested = problem.columns.get("reward_model")
    if isinstance(nested, Mapping) and nested.get("ground_truth") is not None:
        return nested["ground_truth"]
    raise LookupError(f"problem '{problem.id}' has no answer to compare with (data.answer_column)")


def _verl_part(returned: Any) -> Part:
    if isinstance(returned, BaseException):
        return Part(error=describe(returned))
    if not isinstance(returned, Mapping):
        return _to_part(returned)
    if "score" not in returned:
        return Part(error=f"returned a dict without 'score': {', '.join(map(str, returned))}")
    main = _to_part(returned["score"])
    others = {str(name): _to_part(value).value for name, value in returned.items() if name != "score"}
    return Part(main.value, main.error, {name: value for name, value in others.items() if value is not None})


# --- isolated: a hang or a crash in a worker costs one reward


def prepare(name: str) -> Callable[[Batch], dict[str, Any]]:
    """In the worker: the named function, as one that takes a batch and returns plain values."""
    adapter = adapt(load("reward", name, {}))

    def score(batch: Batch) -> dict[str, Any]:
        log = Log()
        parts = [{"value": p.value, "error": p.error, "details": dict(p.details)} for p in adapter(batch, log)]
        return {"parts": parts, "metrics": log.metrics, "extras": log.extras}

    return score


class IsolatedFunction:
    """Calls a function by name in the workers, one trajectory at a time."""

    def __init__(self, name: str, pool: ProcessPool) -> None:
        self._name, self._pool = name, pool

    def __call__(self, batch: Batch, log: Log) -> list[Part]:
        target = f"{prepare.__module__}:{prepare.__name__}"
        tasks = [PooledCall(target, {"batch": batch.only(i)}, setup=self._name) for i in range(len(batch))]
        outcomes = self._pool.map(tasks)
        return [self._part(i, outcome, log, len(batch)) for i, outcome in enumerate(outcomes)]

    def _part(self, index: int, outcome: Outcome, log: Log, count: int) -> Part:
        if outcome.error is not None:
            return Part(error=outcome.error)
        for name, values in outcome.value["metrics"].items():
            log.metrics.setdefault(name, []).extend(values)
        for column, values in outcome.value["extras"].items():
            log.extras.setdefault(column, [None] * count)[index] = values[0] if values else None
        return Part(**outcome.value["parts"][0])
