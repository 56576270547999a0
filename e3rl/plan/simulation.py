"""Simulates where a step's time goes on any number of GPUs: rollouts event by event, training and weight sync by formula.

Simulated rollouts follow the real rules: a group goes to any worker with room, a segment is judged when all unfinished
siblings have drawn it, an erased candidate is redrawn while the others continue. Costs are measured, or computed from a
GPU's data sheet; no model is run.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

from e3rl.cluster.parallel import KEEPS_PASSES, keeps_passes
from e3rl.config import Config
from e3rl.errors import UserError
from e3rl.objectives import build


@dataclass(frozen=True)
class Costs:
    """What a worker's engine and a trainer need, in seconds. A decode step of b rows takes step + row * b."""

    step: float
    row: float
    prompt: float  # for one group's prompt
    train_token: float  # scoring and gradients, one GPU
    sync: float  # new weights to all workers
    reward: float = 0.0  # of a whole step
    start: float = 0.0  # of a worker's part in a batch: connection, first exchange
    candidate: float = 0.0  # beside its decode steps: judging it, starting the next
    python_token: float = 0.0  # of rank 0, per generated token


@dataclass(frozen=True)
class Work:
    """What a step generates. ``erase`` is the chance that a candidate is erased, ``end`` that a segment is the last."""

    groups: int
    siblings: int
    segment_length: int
    segments: int
    erase: float
    end: float
    max_erasures: int = 5
    prompt_tokens: int = 128

    def __post_init__(self) -> None:
        if min(self.groups, self.siblings, self.segment_length, self.segments) < 1:
            raise UserError("groups, siblings, segments and their length must all be at least 1")
        if not (0 <= self.erase <= 1 and 0 <= self.end <= 1):
            raise UserError("the chances of erasing and of ending must lie between 0 and 1")


@dataclass(frozen=True)
class RolloutTime:
    """One simulated batch. ``waiting``: share of the rows' time in flight spent at a barrier, not decoding. ``ends``: when each
    group is complete."""

    seconds: float
    tokens: int
    erased_tokens: int
    waiting: float
    idle: float  # share of the workers' time after their last group, while others still work
    ends: tuple[float, ...]


@dataclass(frozen=True)
class StepTime:
    """Times of a whole step. ``ahead``: rollouts run in parallel with training, else before it."""

    rollout: RolloutTime
    train: float
    sync: float
    reward: float
    python: float  # of rank 0, not overlapped: an upper bound
    ahead: bool

    @property
    def seconds(self) -> float:
        """From the step's beginning to the next one's."""
        rollout = self.rollout.seconds + self.reward + self.python
        return (max(rollout, self.train) if self.ahead else rollout + self.train) + self.sync

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        parts = {
            "rollout": self.rollout.seconds,
            "training": self.train,
            "weights": self.sync,
            "rewards": self.reward,
            "python": self.python,
        }
        return max(parts, key=lambda name: parts[name])


@dataclass(slots=True)
class _SimulatedSibling:
    segment: int = 0
    drawn: bool = False  # has its first candidate of this segment and waits for the others
    attempt: int = 0
    finished: bool = False
    since: float = 0.0


@dataclass(slots=True)
class _SimulatedWorker:
    rows: int
    clock: float = 0.0
    steps: int = 0  # decode steps so far
    active: list[tuple[int, int, _Group, int]] = field(default_factory=list)
    groups: int = 0


class _Group:
    """A simulated group: the rules of `e3rl.rollout.group`, with random verdicts."""

    def __init__(self, work: Work, chance: random.Random) -> None:
        self.siblings = [_SimulatedSibling() for _ in range(work.siblings)]
        self._work, self._chance = work, chance
        self.tokens = self.erased = 0
        self.waited = self.end = 0.0

    @property
    def finished(self) -> bool:
        return all(s.finished for s in self.siblings)

    def deliver(self, number: int, now: float) -> list[int]:
        """Take a finished candidate; returns the siblings that draw next."""
        sibling = self.siblings[number]
        self.tokens += self._work.segment_length
        if sibling.attempt == 0:
            sibling.drawn, sibling.since = True, now
            return self._judge_waiting(now)
        return [*self._decide(number), *self._judge_waiting(now)]

    def _judge_waiting(self, now: float) -> list[int]:
        going: list[int] = []
        while ready := [i for i, s in enumerate(self.siblings) if s.drawn and self._open(s.segment)]:
            for number in ready:
                sibling = self.siblings[number]
                sibling.drawn = False
                self.waited += now - sibling.since
                going += self._decide(number)
        return going

    def _open(self, segment: int) -> bool:
        """Whether every sibling that is still going has drawn a first candidate of this segment."""
        return all(
            s.finished or s.segment > segment or (s.segment == segment and (s.drawn or s.attempt > 0))
            for s in self.siblings
        )

    def _decide(self, number: int) -> list[int]:
        sibling, work = self.siblings[number], self._work
        if sibling.attempt < work.max_erasures and self._chance.random() < work.erase:
            sibling.attempt += 1
            self.erased += work.segment_length
            return [number]
        sibling.segment, sibling.attempt = sibling.segment + 1, 0
        sibling.finished = sibling.segment == work.segments or self._chance.random() < work.end
        return [] if sibling.finished else [number]


def simulate_rollouts(work: Work, costs: Costs, workers: int, rows: int, seed: int = 0) -> RolloutTime:
    """One batch on ``workers`` engines of ``rows`` rows each."""
    if workers < 1 or rows < work.siblings:
        raise UserError(f"{workers} workers of {rows} rows: at least 1 worker with room for a group of {work.siblings}")
    chance = random.Random(seed)
    waiting = [_Group(work, chance) for _ in range(work.groups)]
    groups, engines = list(waiting), [_SimulatedWorker(rows, costs.start) for _ in range(workers)]
    order = [(engine.clock, index) for index, engine in enumerate(engines)]
    heapq.heapify(order)
    serial = 0
    while order:
        _, index = heapq.heappop(order)
        engine = engines[index]
        while waiting and (engine.groups + 1) * work.siblings <= rows and engine.groups < -(-work.groups // workers):
            group = waiting.pop(0)
            engine.groups += 1
            engine.clock += costs.prompt
            for number in range(work.siblings):
                serial += 1
                heapq.heappush(engine.active, (engine.steps + work.segment_length, serial, group, number))
        if not engine.active:
            continue
        end, _, group, number = engine.active[0]
        engine.clock += (end - engine.steps) * (costs.step + costs.row * len(engine.active))
        engine.steps = end
        engine.clock += costs.candidate
        heapq.heappop(engine.active)
        for following in group.deliver(number, engine.clock):
            serial += 1
            heapq.heappush(engine.active, (engine.steps + work.segment_length, serial, group, following))
        if group.finished:
            engine.groups, group.end = engine.groups - 1, engine.clock
        heapq.heappush(order, (engine.clock, index))
    return _summary(groups, engines, work)


def _summary(groups: list[_Group], engines: list[_SimulatedWorker], work: Work) -> RolloutTime:
    seconds = max(engine.clock for engine in engines)
    in_flight = sum(engine.clock for engine in engines) / len(engines)
    held = in_flight * min(work.groups, sum(engine.rows // work.siblings for engine in engines)) * work.siblings
    return RolloutTime(
        seconds=seconds,
        tokens=sum(g.tokens for g in groups),
        erased_tokens=sum(g.erased for g in groups),
        waiting=min(1.0, sum(g.waited for g in groups) / held) if held else 0.0,
        idle=1 - in_flight / seconds if seconds else 0.0,
        ends=tuple(group.end for group in groups),
    )


def simulate_step(
    work: Work, costs: Costs, *, workers: int, rows: int, trainers: int, ahead: bool = False, seed: int = 0
) -> StepTime:
    """A step with ``workers`` engines and ``trainers`` GPUs that train."""
    rollout = simulate_rollouts(work, costs, workers, rows, seed)
    tokens = rollout.tokens - rollout.erased_tokens + work.groups * work.siblings * work.prompt_tokens
    python = rollout.tokens * costs.python_token
    return StepTime(rollout, tokens * costs.train_token / trainers, costs.sync, costs.reward, python, ahead)


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet, and the share of it that programs reach. The defaults are an H100 SXM's.

    The shares and ``weights`` are fitted to published runs (`tests/plan/test_published.py`).
    """

    bandwidth: float = 3.35e12  # bytes/s of its memory
    flops: float = 989e12  # dense bfloat16
    memory: float = 80e9
    bandwidth_share: float = 0.7
    decode_share: float = 0.4
    train_share: float = 0.36
    weights: float = 8.6e9  # bytes/s of new weights, from the trainers to all workers


PYTHON_TOKEN = 1.5e-6
"""Seconds of rank 0's Python per token: receiving, journal, ledger (`python_us_per_token` of benchmarks/scale.py)."""

_HELD = 0.9  # of the memory: what CUDA and the allocator leave
_PADDED = 256  # positions to which a recorded decode step of the torch engine rounds its width


def operations(config: Config) -> float:
    """Operations of a training step per weight and token: 2 for a forward pass, 4 for a backward pass. For groups of several
    micro-batches (`flops_per_param_token` of benchmarks/scale.py counts them)."""
    needs, train = build(config.objective).needs, config.train
    if "frozen" in needs:
        return 0
    keeps = keeps_passes(train, 1) and train.parallel in KEEPS_PASSES
    one_pass = train.num_iterations == 1 and ("rewards_only" in needs or keeps)
    scored = 1 - 1 / train.minibatches if one_pass else 1.0  # all minibatches but the first
    updates = train.num_iterations * (6 + 2 * train.gradient_checkpointing)
    return updates + 2 * ("reference" in needs) + 2 * scored


def fitting_rows(wanted: int, parameters: float, kv_bytes: float, context: float, held: float, gpu: Gpu) -> int:
    """Rows that fit beside bfloat16 weights and ``held`` other bytes, at most ``wanted``."""
    free = gpu.memory * _HELD - 2 * parameters - held
    return max(0, min(wanted, int(free / (kv_bytes * context))))


def read_context(length: int, engine: str) -> float:
    """Mean positions that a decode step reads per row: the row's own in vLLM; the longest row's, padded, in the torch engine,
    where older rows are always in the batch."""
    return length / 2 if engine == "vllm" else -(-length // _PADDED) * _PADDED


def roofline(
    parameters: float, kv_bytes: float, context: float, operations: float, gpu: Gpu | None = None, prompt: int = 256
) -> Costs:
    """Costs of a bfloat16 model on a GPU: decoding by memory and arithmetic, training by arithmetic, weight sync by its rate.

    ``kv_bytes``: of one token's keys and values; ``context``: positions that a row reads on average.
    """
    gpu = gpu or Gpu()
    memory = gpu.bandwidth * gpu.bandwidth_share
    return Costs(
        step=2 * parameters / memory,
        row=kv_bytes * context / memory + 2 * parameters / (gpu.flops * gpu.decode_share),
        prompt=2 * parameters * prompt / (gpu.flops * gpu.decode_share),
        train_token=operations * parameters / (gpu.flops * gpu.train_share),
        sync=2 * parameters / gpu.weights,
        python_token=PYTHON_TOKEN,
    )
