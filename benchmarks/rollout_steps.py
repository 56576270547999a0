"""Steps of an engine that runs so many rows at once, with erasing and without, counted on a stand-in: no model, no clock.

python benchmarks/rollout_steps.py        (about a minute)

The driver and the judge are the real ones. The engine steps as vLLM does: up to ROWS requests at once, the others queue in its
order. A candidate's length and entropies follow from the numbers of its draw. A ratio of 1.00 says that erasing costs what it
generates again; above it, steps were thin. With ``--waiting`` the steps are a clock: how much of its time a trainer waits for
groups, under `rollout.staleness` 0, 1 and 2, and 2 learning from groups as they finish.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from e3rl.config import load_config
from e3rl.engine.protocol import Row, Sampling
from e3rl.engine.requests import uniforms
from e3rl.engine.vllm.core import precedence
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.stats import summarise
from e3rl.types import Candidate, Draw, Group, Problem, Prompt

SIBLINGS, LENGTH, SEGMENTS, END = 8, 64, 8, 200


class CountingEngine:
    """Generates nothing; counts the steps in which it would have been, and the rows of them."""

    def __init__(self, rows: int, held: int) -> None:
        self._at_once, self._held = rows, held
        self._lengths: dict[Row, int] = {}
        self._numbers = itertools.count()
        self._queue: list[tuple[int, int, Row, Candidate]] = []
        self._running: dict[Row, tuple[Candidate, int]] = {}  # and the step at which it ends
        self.steps, self.rows, self.policy_version = 0, 0, 0

    def free_rows(self) -> int:
        return self._held - len(self._lengths)

    def prefill(self, prompt_ids: Sequence[int], siblings: int) -> list[Row]:
        rows = [Row(next(self._numbers)) for _ in range(siblings)]
        self._lengths.update((row, 0) for row in rows)
        return rows

    def length(self, row: Row) -> int:
        return self._lengths[row]

    def extend(self, row: Row, tokens: int, draw: Draw, sampling: Sampling) -> None:
        heapq.heappush(self._queue, (precedence(draw), next(self._numbers), row, candidate(draw, tokens)))

    def poll(self) -> list[tuple[Row, Candidate]]:
        while self._queue and len(self._running) < self._at_once:
            _, _, row, found = heapq.heappop(self._queue)
            self._running[row] = found, self.steps + len(found.ids)
        end = min((end for _, end in self._running.values()), default=self.steps)
        self.rows += len(self._running) * (end - self.steps)
        self.steps = end
        done = [(row, found) for row, (found, last) in self._running.items() if last == end]
        for row, found in done:
            del self._running[row]
            self._lengths[row] += len(found.ids)
        return done

    def rollback(self, row: Row, length: int) -> None:
        self._lengths[row] = length

    def release(self, row: Row) -> None:
        del self._lengths[row]

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        raise NotImplementedError


def candidate(draw: Draw, tokens: int) -> Candidate:
    """Ends with each token with probability 1 / END; its entropies have a level of their own."""
    numbers = uniforms(draw, 2 * tokens + 1)
    ends = np.flatnonzero(numbers[:tokens] < 1 / END)
    size = int(ends[0]) + 1 if len(ends) else tokens
    entropies = np.exp(0.6 * (2 * numbers[-1] - 1)) * (0.5 + numbers[tokens : tokens + size])
    ids = [1] * (size - 1) + [0 if len(ends) else 1]
    ones = np.ones(size)
    return Candidate(ids, -entropies, entropies, 0 * ones, ones, ones, bool(len(ends)))


def roll_out(rows: int, held: int, groups: int, kappa0: float, step: int = 1) -> tuple[Any, list[Group], list[int]]:
    """The engine, and the groups with the step at which each was complete."""
    settings = {
        "data.train": "lab:arith:1-3",
        "rollout.num_generations": SIBLINGS,
        "rollout.segment_length": LENGTH,
        "rollout.max_segments": SEGMENTS,
        "erasure.kappa0": kappa0,
    }
    config = load_config(None, (), [f"{key}={value}" for key, value in settings.items()])
    prompts = [Prompt(Problem(f"p{n}", "", "1"), (1, 2, 3)) for n in range(groups)]
    engine: Any = CountingEngine(rows, held)
    found, times = list[Group](), list[int]()
    for group in run_groups(engine, prompts, GroupSettings(config.rollout, config.erasure, seed=3, step=step)):
        found.append(group)
        times.append(engine.steps)
    return engine, found, times


def count(rows: int, held: int, groups: int, kappa0: float) -> tuple[float, int, float]:
    """r, steps, and rows a step."""
    engine, found, _ = roll_out(rows, held, groups, kappa0)
    return summarise(found).r, engine.steps, engine.rows / engine.steps


def waiting(
    steps: Sequence[Sequence[float]], a_group: float, staleness: int, streams: bool = False
) -> tuple[float, float]:
    """Share of its time that a trainer waits, and how long all takes.

    ``steps`` has, by training step, when each group is complete after the step's rollouts began; ``a_group`` is what training
    on one takes. One step is generated after the other, at most ``staleness`` before the trainer gets to it.
    """
    begun, generated, now, waited = list[float](), 0.0, 0.0, 0.0
    for number, finished in enumerate(steps):
        allowed = begun[number - staleness] if 0 < staleness <= number else (now if staleness == 0 else 0.0)
        start = max(generated, allowed)
        times = sorted(start + time for time in finished)
        generated = times[-1]
        begun.append(now)
        for time in times if streams else [generated] * len(times):
            waited += max(0.0, time - now)
            now = max(now, time) + a_group
    return waited / now, now


def print_waiting(rows: int, groups: int, number: int = 12) -> None:
    """Trainers that take half as long as the rollouts, as long, and twice as long."""
    steps = [roll_out(rows, 2 * rows, groups, 1.0, step)[2] for step in range(1, number + 1)]
    rollouts = sum(times[-1] for times in steps) / number
    ways = {"0": (0, False), "1": (1, False), "2, whole steps": (2, False), "2, as groups finish": (2, True)}
    print(
        f"{rows} rows, {groups} groups of {SIBLINGS}, {number} steps\ntraining/rollouts  staleness            waits  time"
    )
    for share in (0.5, 1.0, 2.0):
        for name, way in ways.items():
            waits, time = waiting(steps, share * rollouts / groups, *way)
            print(f"{share:17.1f}  {name:19s}  {waits:5.2f}  {time / (number * rollouts):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--groups", type=int, nargs="+", default=[12, 48, 192])
    parser.add_argument("--held", type=int, nargs="+", default=[1, 2, 4], help="siblings held, in multiples of rows")
    parser.add_argument("--waiting", action="store_true")
    options = parser.parse_args()
    if options.waiting:
        print_waiting(options.rows[0], options.groups[0])
        return
    print("rows  groups  held  r     steps/((1+r) kept)  rows a step: kept  erasing")
    for rows, groups, held in itertools.product(options.rows, options.groups, options.held):
        _, plain, full = count(rows, held * rows, groups, 1e6)
        r, steps, filled = count(rows, held * rows, groups, 1.0)
        print(
            f"{rows:4d}  {groups:6d}  {held:3d}x  {r:.2f}  {steps / plain / (1 + r):18.2f}  {full:17.1f}  {filled:7.1f}"
        )


if __name__ == "__main__":
    main()
