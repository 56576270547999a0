"""A whole cluster under one seeded clock: a trainer, rollout workers, reward workers and the network between them.

    python -m tests.chaos.cluster --seeds 10000

The real pool, worker, driver, journal and reward pool run on an engine without a model, in simulated threads. The network
drops, delays and repeats calls and cuts weights short; engines fail while they take weights; workers, reward workers and the
trainer die and come back. Whatever happens, of every step each group arrives once, made by the step's weights and no
others; what a restarted trainer finds in its journal is what it had; every reward is one; nobody waits for ever.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from e3rl.cluster import open_groups as open_groups_module
from e3rl.cluster import pool as pool_module
from e3rl.cluster import worker as worker_module
from e3rl.cluster.pool import Place, Terms, WorkerLost, WorkerPool
from e3rl.cluster.rollouts import RemoteRollouts
from e3rl.cluster.worker import RolloutWorker
from e3rl.config import Config, ErasureConfig, RolloutConfig
from e3rl.errors import UserError
from e3rl.rewards import pool as reward_module
from e3rl.rollout.batches import run_groups
from e3rl.rollout.columns import encode
from e3rl.rollout.group import GroupSettings
from e3rl.testing.scripted import Scripted, ScriptedEngine
from e3rl.train.journal import Journal, fingerprint
from e3rl.types import Draw, Problem, Prompt
from e3rl.weights import publish as publish_module
from e3rl.weights.publish import this_node
from tests.chaos.clock import Simulation

VOCABULARY, LONGEST_PROMPT, WORKERS, STEPS = 1_000_001, 8, 3, 3
SAID_EVERY = 1000  # seeds: what a run that is stopped has tried is known
CONFIG = Config(
    rollout=RolloutConfig(num_generations=3, segment_length=4, max_segments=3, max_rows=6, cache_rows=9),
    erasure=ErasureConfig(
        base_weight=0.0, gradient_weight=0.0, extremum_weight=0.0, perturbation_weight=1.0, kappa0=0.3
    ),
)


class TrainerDied(Exception):
    """The trainer's process ends in the middle of a step."""


class Stub:
    """A policy of one weight, whose value is its version."""

    vocabulary, eos_ids, tokenizer = VOCABULARY, (0,), None

    def __init__(self) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        self.set(0)

    def set(self, version: int) -> None:
        with torch.no_grad():
            self.model.weight.fill_(version)

    def trainable(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()


class Engine(ScriptedEngine):
    """Candidates depend on the draw and on the weights, which an unlucky load leaves half taken."""

    def __init__(self, simulation: Simulation | None, fails: float) -> None:
        super().__init__(self._candidate, max_rows=6, cache_rows=9)
        self._simulation, self._fails, self._weight = simulation, fails, -1.0

    def _candidate(self, draw: Draw, tokens: int) -> Scripted:
        rng = random.Random(zlib.crc32(repr((draw, self._weight)).encode()))
        values = tuple(round(rng.uniform(0, 3), 3) for _ in range(tokens))
        ended = draw.segment > 0 and rng.random() < 0.3
        return Scripted(values, tuple(reversed(values)), ended)

    def poll(self) -> list[Any]:
        done = super().poll()
        if self._simulation is not None:
            self._simulation.sleep(self._simulation.rng.uniform(0.0, 0.4))
        return done

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        super().load_weights(weights, version)
        self._weight = -2.0
        if self._simulation is not None and self._simulation.rng.random() < self._fails:
            raise RuntimeError("CUDA error: the device ran out of memory")
        self._weight = float(next(iter(weights.values()))) if weights else float(version)


@dataclass
class Machine:
    """A place where a worker lives, dies and is started again, and the network to it."""

    simulation: Simulation
    chances: Mapping[str, float]
    counts: Counter[str]
    worker: RolloutWorker | None = None
    graves: list[RolloutWorker] = field(default_factory=list)

    def connect(self) -> Machine:
        self.simulation.sleep(self.simulation.rng.uniform(0, 0.2))
        if self._happens("refused"):
            raise WorkerLost("connection refused")
        if self.worker is None:
            self.worker = RolloutWorker(CONFIG, LONGEST_PROMPT, Stub())  # type: ignore[arg-type]
        return self

    def hello(self) -> bytes:
        return self._call("hello")

    def exchange(self, body: bytes) -> bytes:
        return self._call("exchange", body)

    def load_weights(self, version: int, weights: bytes | memoryview, named: str) -> None:
        body = bytes(weights)
        if self._happens("cut short"):
            body = body[: self.simulation.rng.randrange(len(body))]
        self._call("load_weights", version, body, named)

    def take_weights(self, offer: bytes) -> bytes:
        self.counts["weights offered in shared memory"] += 1
        return bytes(self._call("take_weights", offer))

    def close(self) -> None:
        pass

    def _happens(self, what: str) -> bool:
        found = self.simulation.rng.random() < self.chances[what]
        self.counts[what] += found
        return found

    def _call(self, name: str, *arguments: Any) -> Any:
        self.simulation.sleep(self.simulation.rng.expovariate(20))
        if self._happens("death") and self.worker is not None:
            self.graves.append(self.worker)
            self.worker = None
        if self.worker is None or self._happens("request lost"):
            raise WorkerLost(f"no answer to {name}")
        worker = self.worker
        try:
            answer = getattr(worker, name)(*arguments)
            if self._happens("repeated"):
                answer = getattr(worker, name)(*arguments)
        except (UserError, RuntimeError) as error:  # as the server answers: not a 200
            raise WorkerLost(str(error)) from None
        if self._happens("late"):
            self.simulation.sleep(self.simulation.rng.uniform(1, 30))
        if self.worker is not worker or self._happens("answer lost"):
            raise WorkerLost(f"no answer to {name}")
        return answer


def chances(rng: random.Random) -> dict[str, float]:
    """How often each thing happens in one seed: some seeds are calm, some are not."""
    kinds = ("refused", "cut short", "death", "request lost", "repeated", "late", "answer lost")
    return {kind: rng.choice([0.0, 0.02, 0.1]) for kind in kinds} | {"load": rng.choice([0.0, 0.1])}


class Cluster:
    """One seed."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.simulation, self.directory = Simulation(seed), directory
        rng = self.simulation.rng
        self.chances, self.counts = chances(rng), Counter[str]()
        self.trainer_dies = rng.choice([0.0, 0.0, 0.15])
        self.machines = [Machine(self.simulation, self.chances, self.counts) for _ in range(WORKERS)]
        self.prompts = [Prompt(Problem(f"p{i}", ""), (1, 2, 3 + i)) for i in range(rng.randint(1, 6))]

    def settings(self, step: int) -> GroupSettings:
        return GroupSettings(CONFIG.rollout, CONFIG.erasure, seed=1, step=step, policy_version=step)

    def expected(self, step: int) -> dict[str, Any]:
        """The groups of a step, made here."""
        engine = Engine(None, 0.0)
        engine.load_weights({}, step)
        return {g.prompt.problem.id: encode([g]) for g in run_groups(engine, self.prompts, self.settings(step))}

    def trainer(self, policy: Stub) -> RemoteRollouts:
        """A process's rollouts, as `e3rl.cluster.rollouts` builds them."""
        terms = Terms("stub", VOCABULARY, LONGEST_PROMPT + CONFIG.rollout.completion_limit, 20.0)
        places = [Place(f"w{i}", machine.connect) for i, machine in enumerate(self.machines)]
        journal = Journal(self.directory, lambda: fingerprint(policy.model), lambda text: None)
        return RemoteRollouts(WorkerPool(places, terms), policy, journal)  # type: ignore[arg-type]

    def run(self) -> None:
        """Some steps, by as many trainers as it takes."""
        with ExitStack() as stack:
            for module in (pool_module, open_groups_module, worker_module):
                stack.enter_context(mock.patch.object(module, "threading", self.simulation.threading))
            for module in (pool_module, publish_module):
                stack.enter_context(mock.patch.object(module, "time", self.simulation.time))
            node = lambda: self.simulation.rng.choice([this_node(), "another machine"])  # noqa: E731
            stack.enter_context(mock.patch.object(worker_module, "this_node", node))
            stack.enter_context(mock.patch.object(worker_module, "architecture", return_value="stub"))
            build = lambda *_: Engine(self.simulation, self.chances["load"])  # noqa: E731
            stack.enter_context(mock.patch.object(worker_module, "build_engine", build))
            stack.callback(self.simulation.end)
            policy, rollouts = Stub(), None
            for step in range(STEPS):
                policy.set(step)
                had: dict[str, Any] = {}
                while True:
                    rollouts = rollouts or self.trainer(policy)
                    try:
                        rollouts.load_weights(step, dict(policy.trainable()))
                        self._step(rollouts, step, had)
                        break
                    except (TrainerDied, UserError) as end:
                        if isinstance(end, UserError) and "no rollout worker is left" not in str(end):
                            raise
                        rollouts.close()
                        rollouts = None
                        self.counts[
                            "trainer died" if isinstance(end, TrainerDied) else "run ended: no worker left"
                        ] += 1
            if rollouts is not None:
                rollouts.close()
            self.close()

    def _step(self, rollouts: RemoteRollouts, step: int, had: dict[str, Any]) -> None:
        """The groups of a step, each once, and those that the trainer before had the same as then."""
        found: dict[str, Any] = {}

        def tick() -> None:
            if self.simulation.now > 20_000:
                raise AssertionError("a step takes hours")

        for group in rollouts.run(self.prompts, self.settings(step), tick):
            name, encoded = group.prompt.problem.id, encode([group])
            assert name not in found, f"{name} came twice"
            found[name] = encoded
            assert had.setdefault(name, encoded).equals(encoded), f"{name} is another than before the restart"
            if self.simulation.rng.random() < self.trainer_dies:
                raise TrainerDied
        expected = self.expected(step)
        assert found.keys() == expected.keys(), "a group is lost"
        for name, encoded in found.items():
            assert encoded.equals(expected[name]), f"step {step}: {name} was made by other weights"

    def close(self) -> None:
        """End all workers; their threads end, too."""
        for machine in self.machines:
            for worker in [*machine.graves, *([machine.worker] if machine.worker else [])]:
                worker.close()
        for _ in range(100):
            if len(self.simulation.threads) == 1:
                break
            self.simulation.sleep(60)
        assert len(self.simulation.threads) == 1, "a thread never ends"


class RewardProcess:
    """A reward worker that answers, hangs, dies or talks nonsense, on the simulated clock."""

    simulation: Simulation
    counts: Counter[str]

    def __init__(self) -> None:
        self.process = mock.Mock(pid=0)
        self.connection, self.index, self.deadline = self, None, 0.0
        self._events: list[tuple[float, bytes | None]] = []

    def begin(self, index: int, task: Any, seconds: float) -> None:
        rng = self.simulation.rng
        now = self.simulation.now
        self.index, self.deadline = index, now + reward_module.START_LIMIT
        if rng.random() < 0.05:
            self.counts["reward worker dead at start"] += 1
            raise OSError("broken pipe")
        started, takes = now + rng.uniform(0, 2), rng.uniform(0, 3)
        how = rng.choices(["answers", "hangs", "dies", "fails"], [80, 6, 6, 8])[0]
        self.counts[f"reward worker {how}"] += 1
        last = {"answers": {"value": task.arguments["x"] * 2}, "fails": {"error": "ValueError: no"}}.get(how)
        self._events = [(started, json.dumps({"started": True}).encode())]
        if how != "hangs":
            self._events.append((started + takes, json.dumps(last).encode() if last else None))

    def due(self) -> float:
        return self._events[0][0] if self._events else float("inf")

    def recv_bytes(self) -> bytes:
        _, said = self._events.pop(0)
        if said is None:
            raise EOFError
        return said

    def kill(self) -> int:
        self._events = []
        return -9


def rewards(simulation: Simulation, counts: Counter[str]) -> None:
    """A batch of rewards: each task has one outcome, its own, in time."""
    process = type("Process", (RewardProcess,), {"simulation": simulation, "counts": counts})

    def wait(connections: Sequence[Any], patience: float) -> list[Any]:
        first = min([c.due() for c in connections] + [simulation.now + patience])
        simulation.now = max(simulation.now, first)
        return [c for c in connections if c.due() <= simulation.now]

    tasks = [reward_module.PooledCall("t:f", {"x": i}) for i in range(simulation.rng.randint(1, 12))]
    size = simulation.rng.randint(1, 3)
    with (
        mock.patch.object(reward_module, "_Worker", process),
        mock.patch.object(reward_module, "wait", wait),
        mock.patch.object(reward_module, "time", simulation.time),
    ):
        began, pool = simulation.now, reward_module.ProcessPool(size, 2.0)
        outcomes = pool.map(tasks)
        pool.close()
    assert len(outcomes) == len(tasks)
    for i, outcome in enumerate(outcomes):
        assert (outcome.value == 2 * i) != (outcome.error is not None), f"task {i}: {outcome}"
    most = 2 * len(tasks) * (2.0 + 2.0 + reward_module.GRACE)
    assert simulation.now - began <= most, "the deadlines do not hold"


def simulate(seeds: range) -> Counter[str]:
    """Run these seeds; AssertionError names the seed that breaks a promise."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        with tempfile.TemporaryDirectory() as directory:
            cluster = Cluster(seed, Path(directory))
            try:
                cluster.run()
                rewards(cluster.simulation, cluster.counts)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        counts += cluster.counts
        counts["groups"] += STEPS * len(cluster.prompts)
        counts["switches between threads"] += cluster.simulation.switches
        counts["seeds"] += 1
    return counts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    counts, end = Counter[str](), options.first + options.seeds
    for first in range(options.first, end, SAID_EVERY):
        counts += simulate(range(first, min(end, first + SAID_EVERY)))
        print(", ".join(f"{kind} {n}" for kind, n in sorted(counts.items())), flush=True)


if __name__ == "__main__":
    main()
