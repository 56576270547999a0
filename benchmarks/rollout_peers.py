"""Our engine beside its peers, each with its fastest settings: a part of `benchmarks/rollout.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from rollout_workloads import (
    BATCHINGS,
    Workload,
    by_continuous_batching,
    by_engine,
    by_generate,
    engine_for,
    load,
)

from e3rl.engine.torch.threads import operation_threads

Values = dict[str, Any]


def in_turns(repeats: int, *tasks: Callable[[], object]) -> list[list[float]]:
    """Seconds of each task, run ``repeats`` times in turn; a first round is left out where there are three or more."""
    seconds: list[list[float]] = [[] for _ in tasks]
    for _ in range(repeats):
        for task, taken in zip(tasks, seconds, strict=True):
            taken.append(_seconds(task))
    return [taken[1:] if repeats > 2 else taken for taken in seconds]


def _seconds(task: Callable[[], object]) -> float:
    began = time.perf_counter()
    task()
    return time.perf_counter() - began


Setting = tuple[Callable[[Workload], object], int]


def _fastest(settings: Mapping[str, Setting], trial: Workload) -> tuple[str, Setting]:
    """The setting that does ``trial`` in the least time, at the better of two runs.

    One that took half as long again as the fastest gets no second run, except the first, which may have been warming up.
    """
    tasks = {name: _with_threads(setting, trial) for name, setting in settings.items()}
    taken = {name: _seconds(task) for name, task in tasks.items()}
    near = [name for number, name in enumerate(tasks) if number == 0 or taken[name] < 1.5 * min(taken.values())]
    taken |= {name: min(taken[name], _seconds(tasks[name])) for name in near}
    name = min(taken, key=taken.__getitem__)
    return name, settings[name]


def _with_threads(setting: Setting, work: Workload) -> Callable[[], None]:
    run, threads = setting

    def task() -> None:
        with operation_threads(threads):
            run(work)

    return task


def _peers(model: Any, trial: Workload, ragged: bool) -> dict[str, tuple[str, Setting]]:
    """Each peer's fastest setting and its name."""
    threads = sorted({1, torch.get_num_threads()})
    plain: dict[str, Setting] = {f"{n} threads": (lambda work: by_generate(model, work), n) for n in threads}
    found = {"generate": _fastest(plain, trial)}
    if ragged:
        continuous: dict[str, Setting] = {
            f"{n} threads, {batching}": (partial(by_continuous_batching, model, batching=batching), n)
            for n in threads
            for batching in BATCHINGS
        }
        found["continuous_batching"] = _fastest(continuous, trial)
    return found


def against_peers(name: str, batch: int, ragged: bool, repeats: int, trial_limit: int) -> Values:
    """Useful tokens per second of generate, of continuous batching where lengths are ragged, and ours."""
    model = load(name)
    vocabulary = model.config.vocab_size
    work, engine = Workload.of(vocabulary, batch, ragged), engine_for(model, batch)
    peers = _peers(model, Workload.of(vocabulary, batch, ragged, trial_limit), ragged)
    tasks = [_with_threads(setting, work) for _, setting in peers.values()]
    seconds = in_turns(repeats, lambda: by_engine(engine, work), *tasks)
    rates = {key: work.useful_tokens / median(s) for key, s in zip(("e3rl", *peers), seconds, strict=True)}
    kind = f"{'ragged' if ragged else 'full'}_{batch}"
    values: Values = {f"vs_generate_{kind}": rates["e3rl"] / rates["generate"]}
    if ragged:
        values[f"vs_continuous_batching_{batch}"] = rates["e3rl"] / rates["continuous_batching"]
    values |= {f"tokens_per_second_{kind}": rates, f"peer_settings_{kind}": {p: n for p, (n, _) in peers.items()}}
    return values
