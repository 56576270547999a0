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
from collections.abc import Callable
from dataclasses import dataclass, field
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
from tests.cluster.places import SETTINGS
from tests.train.random_lab import lab_config

RUN = (
    "data.train_limit=8",
    "train.steps=6",
    "train.prompts_per_step=4",
    "train.learning_rate=1e-2",
    "train.save_steps=1",
)


@dataclass
class Killed:
    """What was done and what came of it."""

    kills: int = 0
    lost: int = 0  # calls that ended in WorkerLost, and no other way
    resumes: int = 0
    runs: int = 0
    identical: int = 0
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The figures, for people."""
        return [
            f"rollout workers on Ray: kills {self.kills}, noticed {self.lost}, resumes {self.resumes}, "
            f"identical finals {self.identical} of {self.runs}",
            *self.wrong,
        ]


def outcome(config: Config, resume: bool = False) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """A run's responses with their rewards, and its final weights."""
    trainer = Trainer(config, resume=resume)
    trainer.train()
    ledgers = sorted((trainer.run_path / "rollouts").glob("*.parquet"))
    columns = ["step", "problem_id", "sibling", "policy_version", "response", "finish", "reward"]
    rows = [row for ledger in ledgers for row in pq.read_table(ledger, columns=columns).to_pylist()]
    return rows, load_file(trainer.run_path / "model" / "model.safetensors")


def kill_some(found: Killed, kills: int, rng: random.Random, chance: float) -> None:
    """From now on a call may kill its worker, at a random moment of the call."""
    exchange = RayConnection.exchange

    def killing(self: RayConnection, body: bytes) -> bytes:
        if found.kills >= kills or rng.random() >= chance:
            return exchange(self, body)
        pid = self._ray.get(self._actor.__ray_call__.remote(lambda _: os.getpid()), timeout=60)
        reference = self._actor.exchange.remote(body)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        found.kills += 1
        try:
            return self._wait(reference, 60)  # type: ignore[no-any-return]
        except WorkerLost:
            found.lost += 1
            raise

    RayConnection.exchange = killing  # type: ignore[method-assign]


def chaos(directory: Path, kills: int, seconds: float, seed: int = 0, say: Callable[[str], None] = print) -> Killed:
    """Kill workers that many times, or for so many seconds; every run is compared with one of a single process."""
    found, rng, end = Killed(), random.Random(seed), time.monotonic() + seconds
    rows, weights = outcome(lab_config(directory, *SETTINGS, *RUN, "run.name=alone"))
    kill_some(found, kills, rng, chance=0.2)
    while found.kills < kills and time.monotonic() < end:
        name, resume = f"run.name=run-{found.runs}", False
        while True:
            config = lab_config(directory, *SETTINGS, *RUN, name, "rollout.workers=2")
            try:
                seen = outcome(config, resume)
                break
            except UserError as error:
                if "no rollout worker is left" not in str(error):
                    raise
                found.resumes += 1
                resume = True
        found.runs += 1
        same = seen[0] == rows and all(torch.equal(seen[1][key], tensor) for key, tensor in weights.items())
        found.identical += same
        found.wrong += [] if same else [f"{name} is another run than the undisturbed one"]
        say(f"{name}: {found.kills} kills so far, {'identical' if same else 'WRONG'}")
    return found


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
