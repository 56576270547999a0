"""FSDP2: one root that holds everything, and gradients summed in float32, on one rank in this process."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from e3rl.cluster.ranks import Ranks
from e3rl.cluster.sharding import ShardedOptimizer, shard
from e3rl.config import TrainConfig
from e3rl.models import load_policy
from e3rl.train.attribution import packed_attention
from e3rl.train.packing import PackedRow, TrainSequence
from e3rl.train.scoring import score_row
from tests.train.random_lab import lab_config


@pytest.fixture
def one_rank() -> Iterator[Ranks]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield Ranks()
    dist.destroy_process_group()


def _sequence(ids: list[int]) -> TrainSequence:
    size = len(ids) - 2
    zeros_T = torch.zeros(size)
    return TrainSequence(tuple(ids[:2]), tuple(ids[2:]), zeros_T.long(), zeros_T == 0, zeros_T, 0, 0, False)


def test_one_root_divides_all_and_sums_in_float32(one_rank: Ranks, tmp_path):
    """64 micro-batches of a bfloat16 model: the float32 weights get the exact sum of their gradients."""
    train = TrainConfig(parallel="fsdp2", max_grad_norm=1e9)
    config = lab_config(tmp_path, "model.dtype=bfloat16").model
    plain, policy = load_policy(config), load_policy(config)
    root = shard(policy.model, policy.device, train, one_rank)
    units = [m for m in root.modules() if isinstance(m, FSDPModule)]
    layers = policy.model.model.layers
    assert sorted(map(id, units)) == sorted(map(id, (root, *layers)))
    assert all(isinstance(p, DTensor) for p in policy.model.parameters())
    optimizer = ShardedOptimizer(policy.trainable(), train, one_rank)

    exact = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in plain.trainable()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(64):
        row = PackedRow.of([_sequence(torch.randint(3, 20, (12,), generator=generator).tolist())], policy.device)
        for model, run in ((policy.model, root), (plain.model, lambda work: work(plain.model))):
            with packed_attention(model):
                run(lambda m, row=row: score_row(m, row, 1.0).logprobs_N).sum().backward()
        for name, p in plain.trainable():
            exact[name] += p.grad.double()
            p.grad = None
    optimizer._collect()
    for name, master in zip(optimizer._names, optimizer._masters, strict=True):
        error = (master.grad.to_local().double() - exact[name]).norm() / exact[name].norm()
        assert error < 4e-3, f"{name}: {error:.2e}"
