"""Whole copies of the weights that the start of a run puts on a host: a key of `benchmarks/scale.py`, and a 32B start in figures.

python benchmarks/scale_start.py [--ranks 64]

The second starts one of so many ranks of a model of Qwen3-32B's sizes, as FSDP2 divides it, from a file that takes no room on the
disk (nothing but zeros), and looks how much memory the process has meanwhile.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from scale_figure import Figure
from scale_ranks import DEMO, in_ranks
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen3Config, Qwen3ForCausalLM

from e3rl.cluster.ranks import Ranks
from e3rl.cluster.rollouts import RemoteRollouts
from e3rl.cluster.sharding import ShardedOptimizer, shard
from e3rl.config import ModelConfig, TrainConfig, load_config
from e3rl.lab import lab_directory
from e3rl.models import ReferencePolicy, load_policy
from e3rl.plan.dry_run import Allocations
from e3rl.plan.memory import GIB
from e3rl.train.trainer import Trainer
from e3rl.weights.files import without_memory

A_NODE = 8  # ranks
A_FILE = 5 * 10**9  # bytes, as large models are published


class OnHost(Allocations):
    """Counts what has memory."""

    def count(self, tensor: Tensor) -> None:
        if not tensor.is_meta:
            super().count(tensor)


def _with_tokenizer(directory: Path) -> None:
    for file in lab_directory().iterdir():
        if file.name.startswith("token") or file.name == "generation_config.json":
            (directory / file.name).write_bytes(file.read_bytes())


def _local_bytes(model: Any) -> int:
    return sum(getattr(p, "_local_tensor", p).nbytes for p in model.parameters())


def _start(model: Path, ranks: Ranks, place: Path) -> dict[str, float]:
    """In whole models: this rank at the worst moment of its start beside its parts of policy and reference; what it published."""
    own = place / f"rank-{ranks.rank}"
    own.mkdir()
    settings = ("train.parallel=fsdp2", f"model.path={model}", f"run.output_dir={place}", "run.name=start")
    config = load_config(DEMO, [], [*settings, 'rollout.servers=["http://127.0.0.1:9"]', "objective.kl_coef=0.04"])
    with (
        OnHost() as counted,
        mock.patch("e3rl.train.trainer.require_scorable"),
    ):  # passes through what is divided already
        trainer = Trainer(config)
    run, reference = trainer.run, trainer.run.learner.reference
    assert reference is not None
    divided = _local_bytes(run.policy.model) + _local_bytes(reference.frozen)
    whole = sum(p.nbytes for p in run.policy.model.parameters())
    published = 0
    if isinstance(run.rollouts, RemoteRollouts) and run.rollouts._published is not None:
        published = run.rollouts._published.offer.size
    run.rollouts.close()
    if run.directory is not None:
        run.directory.release()
    return {"beside": (counted.peak - divided) / whole, "published": published / whole, "parts": divided / whole}


def host_copies() -> Figure:
    """Whole copies on a host of two ranks under FSDP2 with a reference model and rollouts elsewhere, beside what is divided."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        torch.manual_seed(0)
        Qwen3ForCausalLM(_shape(hidden=64, layers=32, vocabulary=256)).save_pretrained(directory)
        _with_tokenizer(directory)
        found = in_ranks(partial(_start, directory), 2)
    beside, published = (sum(rank[name] for rank in found) for name in ("beside", "published"))
    parts = {
        "published for the workers": published,
        "while it starts": beside,
        "divided": sum(r["parts"] for r in found),
    }
    return Figure(beside + published, 1.1, parts)


def _shape(hidden: int, layers: int, vocabulary: int, **others: int) -> Qwen3Config:
    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4, **others}
    return Qwen3Config(
        hidden_size=hidden,
        intermediate_size=5 * hidden,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        **sizes,
        tie_word_embeddings=False,
    )


def _write_zeros(directory: Path) -> None:
    """A model of Qwen3-32B's sizes in bfloat16, whose weights are a hole in a file."""
    shape = _shape(5120, 64, 151_936, num_attention_heads=64, num_key_value_heads=8, head_dim=128)
    with without_memory():
        model = Qwen3ForCausalLM(shape)
    where: dict[str, str] = {}
    files: list[dict[str, Any]] = []
    end = A_FILE
    for name, parameter in model.named_parameters():
        if end >= A_FILE:
            files, end = [*files, {}], 0
        begin, end = end, end + 2 * parameter.numel()
        files[-1][name] = {"dtype": "BF16", "shape": [*parameter.shape], "data_offsets": [begin, end]}
        where[name] = f"model-{len(files)}.safetensors"
    for number, entries in enumerate(files, 1):
        head, last = json.dumps(entries).encode(), max(entry["data_offsets"][1] for entry in entries.values())
        with (directory / f"model-{number}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(head)) + head)
            file.truncate(8 + len(head) + last)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    shape.architectures = ["Qwen3ForCausalLM"]
    shape.save_pretrained(directory)
    _with_tokenizer(directory)


class Watched:
    """The most memory of its own that this process has inside the ``with`` block; pages of files, which can be dropped, aside."""

    def __enter__(self) -> Watched:
        self.most, self._over = self._now(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, self._now())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=64, help="how many divide the model; default 64")
    options = parser.parse_args()
    train, ranks = TrainConfig(parallel="fsdp2"), Ranks(0, options.ranks)
    with tempfile.TemporaryDirectory() as place:
        _write_zeros(Path(place))
        dist.init_process_group("fake", rank=0, world_size=options.ranks, store=FakeStore())
        began = time.perf_counter()
        with Watched() as watched:
            before = watched.most
            policy = load_policy(ModelConfig(path=place, device="cpu", dtype="bfloat16"), empty=True)
            frozen = ReferencePolicy(policy.model).frozen
            for model in (policy.model, frozen):
                shard(model, policy.device, train, ranks, frozen=model is frozen)
                policy.fill(model)
            loaded = watched._now()
            optimizer = ShardedOptimizer(policy.trainable(), train, ranks)
        seconds = time.perf_counter() - began
        whole = sum(p.nbytes for p in policy.model.parameters())
        parts = _local_bytes(policy.model) + _local_bytes(frozen)
        masters = sum(w._local_tensor.nbytes for w in optimizer._masters)  # type: ignore[attr-defined]
        dist.destroy_process_group()
    beside = watched.most - before - parts - masters
    print(f"{whole / GIB:.1f} GiB of weights, one of {options.ranks} ranks, {seconds:.1f} s")
    print(f"its parts of policy and reference: {parts / GIB:.2f} GiB; float32 weights: {masters / GIB:.2f} GiB")
    print(
        f"the process with its parts: {(loaded - before) / GIB:.2f} GiB more; at most {beside / GIB:.2f} GiB beside them"
    )
    host = A_NODE * (before + beside) + whole
    print(f"a host of {A_NODE} GPUs, which have the parts, with one published copy: {host / GIB:.1f} GiB")


if __name__ == "__main__":
    main()
