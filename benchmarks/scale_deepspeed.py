"""Bytes that DeepSpeed's ZeRO-2 asks for in one of several ranks against those that are planned: small models, on a CPU.

python benchmarks/scale_deepspeed.py [RANKS] [--size NAME]        in an environment with e3rl[deepspeed]

The other ranks are PyTorch's fake process group, which exchanges nothing; so an update's norm is set.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from e3rl.cluster import deepspeed as ours
from e3rl.cluster.ranks import Ranks
from e3rl.config import Config, load_config
from e3rl.plan import division
from e3rl.plan.dry_run import COUNTED, Allocations, hidden_and_head
from e3rl.plan.memory import make_plan

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4000,
    "tie_word_embeddings": True,
}
_WIDER = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "vocab_size": 16000,
}
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "small": (SHAPE, 2_000_000),
    "wider": (SHAPE | _WIDER, 10_000_000),
    "untied": (SHAPE | _WIDER | {"tie_word_embeddings": False}, 7_000_000),
}
"""A model's shape, and entries of a bucket: fewer than the model has, as at full size; in the last fewer than its embeddings
have, as in an 8B model."""


def settings(directory: Path, shape: dict[str, Any], ranks: int) -> Config:
    """A run whose model is in ``directory``, with rollouts elsewhere."""
    AutoConfig.for_model("qwen3", **shape).save_pretrained(directory)
    overrides = [
        *(
            f"model.path={directory}",
            "data.train=owner/name",
            "train.steps=1",
            "model.dtype=bfloat16",
            "data.max_prompt_length=64",
            f"train.prompts_per_step={ranks}",
        ),
        *("train.parallel=deepspeed-zero2", "train.gradient_checkpointing=true", "train.micro_batch_tokens=256"),
        *("rollout.segment_length=64", "rollout.max_segments=2", "objective.kl_coef=0.0", "train.minibatches=2"),
        "rollout.servers=['http://127.0.0.1:1']",
    ]
    return load_config(overrides=overrides)


def asked(config: Config, tokens: int, ranks: int) -> tuple[int, int]:
    """Bytes held, and at the worst moment of two steps of two micro-batches."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0", RANK="0", WORLD_SIZE=str(ranks))
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    found = AutoConfig.from_pretrained(config.model.path)

    with _Counted() as counted:
        model: Any = AutoModelForCausalLM.from_config(found, dtype=torch.bfloat16, attn_implementation=COUNTED)
        model.gradient_checkpointing_enable()
        model.train()
        policy: Any = SimpleNamespace(
            model=model, device=torch.device("cpu"), files=None, trainable=lambda: [*model.named_parameters()]
        )
        engine = ours.start_engine(policy, config.train, Ranks(0, ranks))
        optimizer = ours.DeepSpeedOptimizer(engine, policy, Ranks(0, ranks))
        zero, passes = engine.optimizer, ours.EnginePasses(engine, model)
        zero.check_overflow = lambda **_: setattr(zero, "overflow", False)
        zero.scaled_global_norm = lambda **_: torch.tensor(1.0)
        held = counted.restart()
        for _ in range(2):
            for _ in range(2):
                scores = engine(lambda of: hidden_and_head(of, tokens))
                passes.backward(scores[0].sum())
                del scores
            optimizer.step(1e-6)
    return held, counted.peak


class _Counted(Allocations):
    """Without tensors of the meta device, which take nothing."""

    def count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "meta":
            super().count(tensor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranks", type=int, nargs="?", default=8, help="default: %(default)s")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model, default: %(default)s")
    options = parser.parse_args()
    ranks, (shape, bucket) = options.ranks, SIZES[options.size]
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.object(ours, "BUCKET", bucket),
        mock.patch.object(division, "BUCKET", bucket),
    ):
        config = settings(Path(directory), shape, ranks)
        plan = make_plan(config, ranks, on_cpu=False)
        held, largest = asked(config, plan.row_tokens, ranks)
    trainer, mib = plan.trainer, 2**20
    planned = sum(trainer.held.values())
    print(f"{ranks} ranks, {plan.parameters:,} parameters: held {held / mib:.1f} MiB of {planned / mib:.1f} planned, at most "
          f"{largest / mib:.1f} of {trainer.largest / mib:.1f}, {100 * (trainer.largest / largest - 1):+.1f} %")  # fmt: skip


if __name__ == "__main__":
    main()
