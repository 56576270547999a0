"""What ranks exchange and write: groups once and by value; files from the first alone."""

from __future__ import annotations

import os
import socket
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from e3rl.cluster.ranks import Ranks
from e3rl.cluster.rollouts import RemoteRollouts
from e3rl.models import load_policy
from e3rl.rollout.columns import encode
from e3rl.rollout.ipc import to_ipc
from e3rl.train.collect import exchanged
from e3rl.train.loop import step
from e3rl.train.state import publish_weights
from e3rl.train.trainer import Trainer
from e3rl.weights.image import read_image
from e3rl.weights.publish import Receiver, this_node
from tests.train.random_lab import lab_config, random_lab
from tests.train.rollouts import rewarded_group

WORLD = 2


def in_ranks(work: Any, *arguments: Any) -> None:
    """Run ``work`` in two processes that have met."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    mp.spawn(_rank, (port, work, arguments), nprocs=WORLD)


def _rank(rank: int, port: int, work: Any, arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    work(Ranks(rank, WORLD), *arguments)
    dist.barrier()
    dist.destroy_process_group()


def _exchange(ranks: Ranks) -> None:
    groups = [rewarded_group(f"p{n}", (1.0, 0.0), ((3, 4), (2, 5, n + 1)), ((), (1,))).group for n in range(5)]
    prompts, sent = [group.prompt for group in groups], list[int]()

    def broadcast(tensor: torch.Tensor, group: Any = None, group_src: int | None = None) -> None:
        sent.append(tensor.nbytes)
        original(tensor, group=group, group_src=group_src)

    original = dist.broadcast
    for mine in (ranks.share(groups), groups if ranks.first else [], [] if ranks.first else groups[::-1]):
        with mock.patch.object(dist, "broadcast", broadcast):
            assert exchanged(ranks, prompts, mine) == groups
    assert sent[-1] == len(to_ipc(encode([group]) for group in groups[::-1]))
    assert len(sent) == 4  # two shares, and once for each rank that has all
    lived = [replace(t, environment=Lived(t.sibling + 0.5)) for t in groups[0].trajectories]
    [group] = exchanged(ranks, prompts[:1], [replace(groups[0], trajectories=tuple(lived))] if ranks.first else [])
    assert [t.environment.get_reward() for t in group.trajectories] == [0.5, 1.5], "environments stay where they are"


@dataclass
class Lived:
    """An environment that can't be sent."""

    score: float
    lock: Any = field(default_factory=threading.Lock)

    def get_reward(self) -> float:
        return self.score


def test_groups_travel_once_and_arrive_as_they_were():
    in_ranks(_exchange)


def _first_writes(ranks: Ranks, place: Path, model: str) -> None:
    own = place / f"recipe-{ranks.rank}"
    own.mkdir()
    settings = (
        "train.parallel=ddp",
        "train.save_steps=0",
        "run.name=ranks",
        f"run.output_dir={place}",
        f"model.path={model}",
    )
    trainer, written = Trainer(lab_config(own, *settings)), set[str]()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            written.add(str(arguments[0]))

    sys.addaudithook(note)
    step(trainer.run, trainer.state)
    written = {path for path in written if not path.startswith("/dev/")}
    assert bool(written) == ranks.first, written
    assert sorted(path.name for path in own.iterdir()) == ["recipe.toml"]


def test_the_first_rank_alone_writes_in_a_step(tmp_path: Path):
    in_ranks(_first_writes, tmp_path, random_lab())
    assert {path.name for path in (tmp_path / "ranks").iterdir()} >= {"metrics.jsonl", "rollouts", "journal"}


def _elsewhere(ranks: Ranks, place: Path, model: str) -> None:
    own = place / f"recipe-{ranks.rank}"
    own.mkdir()
    settings = ("train.parallel=fsdp2", "run.name=ranks", f"run.output_dir={place}", f"model.path={model}")
    server = 'rollout.servers=["http://127.0.0.1:9"]'
    with mock.patch("e3rl.train.trainer.build_engine", side_effect=AssertionError("an engine was built")):
        trainer = Trainer(lab_config(own, *settings, server))
    run = trainer.run
    assert run.generating.device == torch.device("meta"), "no rank holds the weights whole"
    run.policy.model.model.norm.weight.data.mul_(2)  # each rank its shard
    publish_weights(run, trainer.state)
    if not ranks.first:
        return
    assert isinstance(run.rollouts, RemoteRollouts)
    wanted = {name: p.detach() for name, p in load_policy(run.config.model).trainable()}
    wanted["model.norm.weight"] = wanted["model.norm.weight"] * 2
    run.rollouts._send()
    published = run.rollouts._pool._weights
    assert published is not None
    with Receiver().taken(published.offer, 1) as image:
        found = read_image(image, published.offer.checksum, wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    run.rollouts.close()


@pytest.mark.skipif(not this_node(), reason="no process's memory can be opened by another here")
def test_divided_weights_are_published_whole_by_the_first_rank_and_no_engine_is_built(tmp_path: Path):
    in_ranks(_elsewhere, tmp_path, random_lab())
