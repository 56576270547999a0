"""Activations that wait for the backward pass in the machine's memory change no bit, and leave the device."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from e3rl.config import Config, ObjectiveConfig, RolloutConfig, TrainConfig
from e3rl.errors import UserError
from e3rl.models import Policy
from e3rl.objectives import build
from e3rl.offload import Offload
from e3rl.plan.dry_run import micro_batch
from e3rl.plan.memory import AWAY, make_plan
from e3rl.train.attribution import packed_attention
from e3rl.train.learner import Learner
from e3rl.train.packing import PackedRow
from e3rl.train.scoring import score_row
from tests.engine.models import EOS, page_model
from tests.engine.models import build as tiny
from tests.train.packs import sequence
from tests.train.random_lab import lab_config
from tests.train.rollouts import rewarded_group

ARCHITECTURES = ("qwen3", "gpt_oss", "qwen3_moe", "qwen3_5_text", "lfm2")


def _weights(name: str, offload: bool, checkpointing: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
    """A model after two updates, and their losses."""
    config = Config(
        objective=ObjectiveConfig("e3rl", {"kl_coef": 0.0}),
        rollout=RolloutConfig(segment_length=4, max_segments=3),
        train=TrainConfig(
            learning_rate=0.01,
            warmup_ratio=0.0,
            micro_batch_tokens=8,
            gradient_checkpointing=checkpointing,
            activation_offload=offload,
        ),
    )
    model = copy.deepcopy(page_model(name))
    learner = Learner(Policy(model, None, "tiny", EOS, 256), build(config.objective), config, updates=2)
    groups = [rewarded_group("first", [1.0, 0.0, 1.0], [[4, 2], [4, 4, 1], [3]])]
    losses = [learner.learn(groups, update)[1].means["loss"] for update in range(2)]
    return model.state_dict(), losses


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_is_the_same_to_the_bit(name: str, checkpointing: bool):
    (plain, losses), (moved, its_losses) = (_weights(name, offload, checkpointing) for offload in (False, True))
    assert its_losses == losses
    assert all(torch.equal(plain[n], moved[n]) for n in plain)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_kept_leaves_the_device_as_planned(checkpointing: bool):
    """Bytes of a real pass beside those that the plan counts on shapes alone."""
    model, tokens = tiny("Qwen3", head_dim=8).train(), 200
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(2, 50, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    with packed_attention(model), Offload(model) as away:
        score_row(model, PackedRow.of([sequence(ids[:1], ids[1:])], torch.device("cpu")), 1.0)
    with torch.device("meta"):
        shape = tiny("Qwen3", "e3rl_counted", head_dim=8)
    planned = micro_batch(shape, tokens, checkpointing, offload=True)
    without = micro_batch(shape, tokens, checkpointing)
    assert away.bytes == pytest.approx(planned.host, rel=0.05)
    assert planned.kept < 0.12 * without.kept
    assert planned.host >= 0.9 * (without.kept - planned.kept)


def test_it_is_in_the_plan(tmp_path: Path):
    overrides = ("train.activation_offload=true", "rollout.workers=1")
    on_gpu = make_plan(lab_config(tmp_path, *overrides), on_cpu=False).trainer
    plain = make_plan(lab_config(tmp_path, "rollout.workers=1"), on_cpu=False).trainer
    assert on_gpu.host[AWAY] > 0.9 * plain.phases["training"]["activations"]
    assert on_gpu.phases["training"]["activations"] < 0.1 * plain.phases["training"]["activations"]
    assert plain.host.get(AWAY, 0) == 0
    here = make_plan(lab_config(tmp_path, *overrides), on_cpu=True).trainer
    assert here.held[AWAY] == on_gpu.host[AWAY], "on a CPU it is the same memory"


def test_divided_weights_are_refused(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"needs ranks that hold all weights: set train\.parallel to ddp or zero1 \(it is"
    ):
        lab_config(tmp_path, "train.activation_offload=true", "train.parallel=fsdp2")
