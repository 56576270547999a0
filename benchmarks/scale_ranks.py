"""What several ranks exchange and write, for `benchmarks/scale.py`: processes that meet by gloo."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scale_figure import Figure
from scale_groups import ROOT, random_group, tokenizer_and_ids
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from e3rl.cluster.ranks import Ranks
from e3rl.cluster.sharding import shard
from e3rl.config import TrainConfig, load_config
from e3rl.models import load_policy
from e3rl.rollout.columns import encode
from e3rl.rollout.ipc import to_ipc
from e3rl.train.collect import exchanged
from e3rl.train.loop import step
from e3rl.train.trainer import Trainer

DEMO = ROOT / "e3rl" / "recipes" / "demo.toml"
WORLD = 3


def in_ranks(work: Callable[[Ranks, Path], Any], world: int = WORLD) -> list[Any]:
    """What each of ``world`` processes, which have met, makes of ``work``."""
    with tempfile.TemporaryDirectory() as place, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        mp.spawn(_rank, (world, port, work, Path(place)), nprocs=world)
        return [json.loads((Path(place) / f"{rank}.json").read_text()) for rank in range(world)]


def _rank(rank: int, world: int, port: int, work: Callable[[Ranks, Path], Any], place: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = work(Ranks(rank, world), place)
    (place / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


class Received(TorchDispatchMode):
    """Counts the bytes that collectives bring to this rank from others."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank, self.bytes = rank, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.bytes += self._count(func.__name__.split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> int:
        if name == "broadcast_":
            return sum(t.nbytes for t in args[0]) if args[2] != self._rank else 0
        if name == "allgather_":
            return sum(t.nbytes for tensors in args[0] for n, t in enumerate(tensors) if n != self._rank)
        if name in ("barrier", "monitored_barrier_"):
            return 0
        raise NotImplementedError(name)


def _exchange(ranks: Ranks, place: Path) -> dict[str, float]:
    """The bytes that come to this rank when all ranks made groups, and when the first has them all from workers elsewhere."""
    _, ids = tokenizer_and_ids()
    groups = [random_group(ids, np.random.default_rng(n), f"p{n}") for n in range(2 * ranks.world)]
    prompts, own = [group.prompt for group in groups], len(to_ipc(encode([group]) for group in groups))
    ratios = {}
    for name, mine in (
        ("each rank made a share", ranks.share(groups)),
        ("the first has them all", groups if ranks.first else []),
    ):
        with Received(ranks.rank) as received:
            found = exchanged(ranks, prompts, mine)
        assert found == groups
        ratios[name] = received.bytes / own
    return ratios


def gather_bytes_ratio() -> Figure:
    """Bytes that come to a rank until it has all groups, over the groups' own; of all ranks and cases the most."""
    found = in_ranks(_exchange)
    parts = {name: max(ratios[name] for ratios in found) for name in found[0]}
    return Figure(max(parts.values()), 1.1, {"ranks": WORLD, **parts})


def _written(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _write(ranks: Ranks, place: Path) -> int:
    """Bytes of the files that this rank has beside the run's directory more after a step than before it."""
    own = place / f"rank-{ranks.rank}"
    own.mkdir()
    tempfile.tempdir = str(own)
    settings = ("train.parallel=ddp", "train.steps=3", "train.eval_steps=0", "train.save_steps=0", "run.name=ranks")
    trainer = Trainer(load_config(DEMO, [], [*settings, f"run.output_dir={place}"]))
    before = _written(own)
    step(trainer.run, trainer.state)
    written = _written(own if not ranks.first else place / "ranks") - before
    if trainer.run.directory is not None:
        trainer.run.directory.release()
    return written


def rank_files() -> Figure:
    """Bytes that ranks but the first write in a step of the demo: each of the others most; the first's stand beside it."""
    first, *others = in_ranks(_write)
    return Figure(max(others), 0, {"the first rank's": first})


def _build(ranks: Ranks, place: Path) -> int:
    """Engines that this rank's trainer builds where a server makes its rollouts."""
    own = place / f"rank-{ranks.rank}"
    own.mkdir()
    settings = ("train.parallel=fsdp2", "run.name=ranks", f"run.output_dir={place}")
    with mock.patch("e3rl.train.trainer.build_engine") as build:
        trainer = Trainer(load_config(DEMO, [], [*settings, 'rollout.servers=["http://127.0.0.1:9"]']))
    trainer.run.rollouts.close()
    if trainer.run.directory is not None:
        trainer.run.directory.release()
    return build.call_count


def trainer_engines() -> Figure:
    """Engines that a rank's trainer builds where its rollouts are elsewhere; under FSDP2, the most of all ranks."""
    return Figure(max(in_ranks(_build, 2)), 0, {"ranks": 2})


def _divide(ranks: Ranks, place: Path) -> tuple[int, int, int]:
    """FSDP2's root modules, its units, and those of them that reduce gradients in float32."""
    config = load_config(DEMO, [], [])
    policy = load_policy(config.model, empty=True)
    root = shard(policy.model, policy.device, TrainConfig(parallel="fsdp2"), ranks)
    units = [module for module in root.modules() if isinstance(module, FSDPModule)]
    inner = {id(below) for unit in units for below in unit.modules() if below is not unit}
    exact = sum(group.mp_policy.reduce_dtype == torch.float32 for u in units for group in _groups(u))
    return sum(id(unit) not in inner for unit in units), len(units), exact


def _groups(unit: FSDPModule) -> list[Any]:
    state = unit._get_fsdp_state()
    return [group for group in [state._fsdp_param_group] if group is not None]


def fsdp_roots() -> Figure:
    """FSDP2's root modules of a model that two ranks divide."""
    (roots, units, exact), _ = in_ranks(_divide, 2)
    return Figure(roots, 1, {"units": units, "units that reduce in float32": exact})
