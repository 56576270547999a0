"""Rollout workers on Ray, killed at random, again and again: the runs must end with the trajectories and weights of one process.

    python -m tests.chaos.ray_workers --kills 50

It needs the environment of `make test-ray`. A worker is killed while it answers a call. A run that ends because no worker is
left is resumed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from e3rl.cluster.pool import WorkerLost
from e3rl.cluster.ray_workers import RayConnection
from e3rl.config import Config
from e3rl.errors import UserError
from e3rl.train.trainer import Trainer
from tests.chaos.killing import Ended, Tally, kill_runs
from tests.cluster.places import SETTINGS
from tests.train.random_lab import lab_config

RUN = (
    "data.train_limit=8",
    "train.steps=6",
    "train.prompts_per_step=4",
    "train.learning_rate=1e-2",
    "train.save_steps=1",
)


def outcome(config: Config, resume: bool = False) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """A run's responses with their rewards, and its final weights."""
    trainer = Trainer(config, resume=resume)
    trainer.train()
    ledgers = sorted((trainer.run_path / "rollouts").glob("*.parquet"))
    columns = ["step", "problem_id", "sibling", "policy_version", "response", "finish", "reward"]
    rows = [row for ledger in ledgers for row in pq.read_table(ledger, columns=columns).to_pylist()]
    return rows, load_file(trainer.run_path / "model" / "model.safetensors")


class Killer:
    """Once installed, a call to a worker may kill it, at a random moment of the call."""

    def __init__(self, rng: random.Random, chance: float) -> None:
        self.left = self.kills = self.noticed = 0
        self._rng, self._chance = rng, chance

    def install(self) -> None:
        exchange, killer = RayConnection.exchange, self

        def killing(self: RayConnection, body: bytes) -> bytes:
            pid = killer.victim(self)
            return killer.call(self, body, pid) if pid else exchange(self, body)

        RayConnection.exchange = killing  # type: ignore[method-assign]

    def victim(self, connection: RayConnection) -> int:
        """The process to be killed at this call; 0 for none, as where it died after its last answer."""
        if self.kills >= self.left or self._rng.random() >= self._chance:
            return 0
        try:
            own = connection._actor.__ray_call__.remote(lambda _: os.getpid())
            return int(connection._ray.get(own, timeout=60))
        except connection._ray.exceptions.RayError:
            return 0

    def call(self, connection: RayConnection, body: bytes, pid: int) -> bytes:
        """Call the worker, and kill it meanwhile; the call must end in WorkerLost, or with an answer of before."""
        reference = connection._actor.exchange.remote(body)
        time.sleep(self._rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        self.kills += 1
        try:
            return connection._wait(reference, 60)  # type: ignore[no-any-return]
        except WorkerLost:
            self.noticed += 1
            raise


def chaos(directory: Path, kills: int, seconds: float, seed: int = 0, say: Callable[[str], None] = print) -> Tally:
    """Kill workers that many times, or for so many seconds; every run is compared with one of a single process."""
    rows, weights = outcome(lab_config(directory, *SETTINGS, *RUN, "run.name=alone"))
    killer = Killer(random.Random(seed), chance=0.2)
    killer.install()
    found: dict[str, Any] = {}

    def one(name: str, left: int) -> Ended:
        killer.left, killer.kills, killer.noticed = left, 0, 0
        resume = (directory / name / "config.toml").exists()
        try:
            found[name] = outcome(
                lab_config(directory, *SETTINGS, *RUN, f"run.name={name}", "rollout.workers=2"), resume
            )
            complete, wrong = True, ""
        except UserError as error:
            complete, wrong = False, "" if "no rollout worker is left" in str(error) else str(error)
        return Ended(complete, killer.kills, "a call", wrong, Counter({"lost workers noticed": killer.noticed}))

    def unlike(name: str) -> str:
        seen_rows, seen_weights = found.pop(name)
        same = all(torch.equal(seen_weights[key], tensor) for key, tensor in weights.items())
        return ", ".join(["trajectories"] * (seen_rows != rows) + ["weights"] * (not same))

    return kill_runs(kills, one, unlike, seconds, say)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = chaos(Path(directory), options.kills, options.seconds, options.seed)
    print("\n".join(found.lines()))
    raise SystemExit(bool(found.wrong))


if __name__ == "__main__":
    main()
