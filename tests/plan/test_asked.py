"""Bytes that real processes ask for, counted while they run, against those that are planned for them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from e3rl.cli.train import train_rank
from e3rl.cluster.training_worker import Begin
from e3rl.config import Config
from e3rl.engine.build import build_engine
from e3rl.engine.torch.engine import TorchEngine
from e3rl.engine.torch.storage import MIB
from e3rl.engine.vllm.core import kv_cache_bytes
from e3rl.errors import UserError
from e3rl.models import ReferencePolicy, load_policy
from e3rl.objectives import build
from e3rl.plan import fit
from e3rl.plan.dry_run import Allocations
from e3rl.plan.memory import make_plan, shape_of
from e3rl.train import attribution
from e3rl.train.learner import Learner
from e3rl.train.listeners import Silent
from e3rl.train.optimizer import MasterOptimizer
from e3rl.train.packing import Branch, PackedRow, group_sequences, packed_size
from tests.train.random_lab import lab_config
from tests.train.rollouts import rewarded_group

MODELS = ("model.dtype=float32", "model.dtype=bfloat16", "model.lora_r=2")


def test_allocations_are_counted_until_they_are_freed():
    with Allocations() as counted:
        first = torch.zeros(1000)
        assert counted.live == 4000
        view = first[10:]
        second = first + 1
        assert (counted.live, counted.peak) == (8000, 8000)
        del first
        assert counted.live == 8000, "a view keeps its storage"
        del view, second
        assert (counted.live, counted.peak) == (0, 8000)
        third = torch.zeros(500)
        third.untyped_storage().resize_(0)
        assert counted.live == 0


@pytest.mark.parametrize("model", MODELS)
def test_optimizer_and_its_scratch(model: str, tmp_path: Path):
    """State is exact, and so are an update's temporaries."""
    config = lab_config(tmp_path, model)
    planned, policy = make_plan(config).trainer, load_policy(config.model)
    with Allocations() as counted:
        optimizer = MasterOptimizer(policy.trainable(), config.train)
        assert counted.live == planned.held["float32 copy of the weights"]
        for _ in range(2):
            for _, parameter in policy.trainable():
                parameter.grad = torch.ones_like(parameter)
                optimizer._sums._add(parameter) if parameter.dtype != torch.float32 else None
            optimizer._collect()
            before = counted.restart()
            optimizer._adamw.step()
        scratch = counted.peak - before
    state = sum(t.nbytes for s in optimizer._adamw.state.values() for t in s.values() if t.numel() > 1)
    assert state == planned.held["optimizer"]
    assert scratch == pytest.approx(planned.phases["optimizer"]["an update's scratch"], rel=0.03)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("budget", [0, 3])
def test_the_torch_engines_cache(model: str, budget: int, tmp_path: Path):
    config = lab_config(tmp_path, model, f"rollout.kv_budget={budget}", "rollout.max_rows=64")
    plan, policy = make_plan(config), load_policy(config.model)
    engine = build_engine(config.rollout, policy.model, policy.eos_ids, plan.prompt)
    assert isinstance(engine, TorchEngine)
    engine.prefill([3, 4], 1)
    assert engine.stats.kv_bytes == plan.trainer.held["KV cache"]
    assert engine._marks._logits_SV is not None
    assert engine._marks._logits_SV.nbytes == plan.trainer.held["logits at candidates' starts"]


def test_vllms_cache_is_within_the_budget(tmp_path: Path):
    model = shape_of(lab_config(tmp_path, "model.dtype=bfloat16").model)
    shape = model.config
    row = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 2 * 160
    assert kv_cache_bytes(model, 8, 160) == 8 * row + row + 2**24
    assert kv_cache_bytes(model, 8, 160, parts=2) == (9 * row + 2**24) // 2
    assert kv_cache_bytes(model, 800, 160, 20 * MIB) == 20 * MIB
    with pytest.raises(UserError, match=r"rollout\.kv_budget = 1 MiB holds no row of 160 tokens .* raise it to 17"):
        kv_cache_bytes(model, 8, 160, MIB)


def test_copies_of_the_weights(tmp_path: Path):
    config = lab_config(
        tmp_path, "rollout.staleness=1", "train.importance_correction=token_mask", "model.dtype=bfloat16"
    )
    planned = make_plan(config).trainer.held
    with Allocations() as counted:
        model = shape_of(config.model)
        whole = counted.live
        assert whole == pytest.approx(planned["weights"], rel=0.001)  # and the rotary embedding's frequencies
        reference = ReferencePolicy(model)
        assert counted.live - whole == pytest.approx(planned["reference weights"], rel=0.001)
        del reference


def _matrix(row: PackedRow, branch: Branch, before: int, window: int | None, query: torch.Tensor) -> torch.Tensor:
    """`causal_lower_right` is a tensor of a class of its own, which can't be made where operations are counted."""
    return row.causal_mask(window, query.dtype)[before : before + branch.size, : before + branch.size]


def _step(config: Config, tokens: int) -> tuple[int, int]:
    """Bytes of a real step of two groups at its worst moment, beside what is held; tokens of its largest row."""
    policy = load_policy(config.model)
    learner = Learner(policy, build(config.objective), config, updates=4)
    sizes = [[tokens // 4] * 4] * 2
    groups = [rewarded_group(name, [1.0, 0.0], sizes) for name in ("first", "second")]
    row = max(packed_size(group_sequences([g.group], False)) for g in groups)
    learner.learn(groups, 0)  # AdamW makes its state
    with Allocations() as counted:
        learner.learn(groups, 1)
    return counted.peak, row


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_a_step(model: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A whole step of the learner, a group a row, against the phases of the plan at that row's size."""
    monkeypatch.setattr(attribution, "_mask", _matrix)
    settings = (model, f"train.gradient_checkpointing={str(checkpointing).lower()}", "objective.kl_coef=0.04")
    real = lab_config(tmp_path, *settings, "rollout.segment_length=40", "rollout.max_segments=4")
    _, row = _step(real, 160)
    wide = f"train.micro_batch_tokens={row}"
    asked, _ = _step(lab_config(tmp_path, *settings, wide, "rollout.segment_length=40", "rollout.max_segments=4"), 160)
    trainer = make_plan(
        lab_config(tmp_path, *settings, wide, "rollout.segment_length=40", "rollout.max_segments=4")
    ).trainer
    held = sum(trainer.held.values())
    planned = max(sum(trainer.phases[phase].values()) for phase in ("training", "optimizer"))
    assert held + asked == pytest.approx(held + planned, rel=0.04)
    assert asked == pytest.approx(planned, rel=0.2)


def test_a_run_that_does_not_fit_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the setting that makes it fit, which is true: with it, the run begins."""
    config = lab_config(tmp_path, "rollout.max_rows=512", "train.micro_batch_tokens=64")
    small = make_plan(lab_config(tmp_path, "rollout.kv_budget=4", "train.micro_batch_tokens=64")).largest
    monkeypatch.setattr(fit, "device_bytes", lambda model: small + 2 * MIB)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights are loaded")

    with monkeypatch.context() as patch:
        patch.setattr("e3rl.train.trainer.load_policy", refuse)
        with pytest.raises(UserError, match="this run does not fit: ") as told:
            train_rank(config, Begin(), Silent())
    [budget] = re.findall(r"fits with rollout\.kv_budget=(\d+): ", str(told.value))
    fit.require_fit(replace(config, rollout=replace(config.rollout, kv_budget=int(budget))), 1)
