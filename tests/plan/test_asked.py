"""Bytes that real processes ask for, counted while they run, against those that are planned for them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from e3rl.cli import main
from e3rl.cli.train import train_rank
from e3rl.cluster.training_worker import Begin
from e3rl.config import Config, to_toml
from e3rl.engine.build import build_engine
from e3rl.engine.torch import fused, operations
from e3rl.engine.torch.engine import TorchEngine
from e3rl.engine.torch.fused import FusedSlotModel, FusedWeights
from e3rl.engine.torch.storage import MIB, StepRows
from e3rl.engine.vllm.core import kv_cache_bytes
from e3rl.errors import UserError
from e3rl.models import ReferencePolicy, load_policy
from e3rl.objectives import build
from e3rl.plan import dry_run, fit
from e3rl.plan.dry_run import Allocations, recorded_bytes
from e3rl.plan.gradients import GradientBuckets, LayerGradients
from e3rl.plan.memory import make_plan, plan_generation, shape_of
from e3rl.train import attribution
from e3rl.train.learner import Learner
from e3rl.train.listeners import Silent
from e3rl.train.optimizer import MasterOptimizer
from e3rl.train.packing import group_sequences, packed_size
from e3rl.weights.publish import Publisher
from tests.train.random_lab import lab_config, random_hybrid
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
@pytest.mark.parametrize("name", ["adamw", "adamw_fused", "muon"])
def test_optimizer_and_its_scratch(name: str, model: str, tmp_path: Path):
    """State is exact, and so are an update's temporaries."""
    config = lab_config(tmp_path, model, f"train.optimizer={name}")
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
            optimizer._apply(config.train.learning_rate)
        scratch = counted.peak - before
    state = sum(t.nbytes for t in optimizer.state().values() if t.numel() > 1)
    assert state == planned.held["optimizer"]
    assert scratch == pytest.approx(planned.phases["optimizer"]["an update's scratch"], rel=0.03, abs=16)


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


@pytest.mark.parametrize("budget", [0, 3])
def test_the_torch_engines_cache_of_a_hybrid(budget: int, tmp_path: Path):
    """Recurrent states and a snapshot of each, within the same bound."""
    config = lab_config(tmp_path, f"model.path={random_hybrid()}", f"rollout.kv_budget={budget}", "rollout.max_rows=64")
    plan, policy = make_plan(config), load_policy(config.model)
    engine = build_engine(config.rollout, policy.model, policy.eos_ids, plan.prompt)
    assert isinstance(engine, TorchEngine)
    engine.prefill([3, 4], 1)
    storage = engine._slot_model.storage
    assert storage.state_bytes == plan.trainer.held["recurrent states and snapshots"] > 0
    assert storage.bytes - storage.state_bytes == plan.trainer.held["KV cache"]
    if budget:
        assert 2.5 * MIB < storage.bytes <= budget * MIB


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


def _by_matrix(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> torch.Tensor:
    """`causal_lower_right` is a tensor of a class of its own, which can't be made where operations are counted."""
    queries, keys = query.shape[2], key.shape[2]
    mask = operations._mask(queries, keys, keys - queries, None, query.dtype, query.device)
    return operations.attention(query, key, value, mask, settings["scale"])


@pytest.mark.parametrize("objective", ["e3rl", "grpo"])
def test_rows_of_a_group_wait_with_their_layers_inputs(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A group of four rows whose scores make the advantages: three of them wait; of GRPO none does, whose advantages are
    made of rewards."""
    monkeypatch.setattr(attribution, "attention_behind", _by_matrix)
    settings = (
        *("model.dtype=bfloat16", "train.gradient_checkpointing=true", f"objective.name={objective}"),
        *("objective.kl_coef=0.0", "rollout.segment_length=40", "rollout.max_segments=4", "rollout.num_generations=4"),
    )
    config = lab_config(tmp_path, *settings, "train.micro_batch_tokens=180")
    trainer = make_plan(config).trainer
    waiting = trainer.phases["training"]["layers' inputs of a group's other rows"]
    assert waiting == (3 * trainer.phases["training"]["activations"] if objective == "e3rl" else 0)
    asked, row = _step(config, 160, siblings=4)
    assert row > 600
    planned = sum(trainer.phases["training"].values())
    assert asked == pytest.approx(planned, rel=0.25)


def test_recorded_decode_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A GPU's buffers and the memory that its graphs work in, as a model with values asks for them."""
    monkeypatch.setattr(fused, "project", operations._ProjectionInPlace)  # as there
    config = lab_config(tmp_path, "model.dtype=bfloat16")
    planned = recorded_bytes(shape_of(config.model), 12, 8, 96)
    model = load_policy(config.model).model
    weights = FusedWeights(model)
    with Allocations() as counted, torch.no_grad():
        slots = FusedSlotModel(weights, 12, 96, record=dry_run._run_once, attend=dry_run._nothing_kept)
        step = StepRows([1] * 8, [95] * 8, slots.storage, slots.device)
        slots.decode(step)
        asked = counted.peak - slots.storage.bytes
    assert slots.storage.scratch + 1 == 13
    assert asked == pytest.approx(planned, rel=0.05)
    vocabulary = len(shape_of(config.model).get_input_embeddings().weight)
    assert planned > 13 * vocabulary * 2, "the logits' buffer has a row for every slot"
    on_gpu, on_cpu = (make_plan(config, on_cpu=on_cpu).trainer.held for on_cpu in (False, True))
    assert on_gpu["CUDA graphs and their buffers"] > 0 == on_cpu["CUDA graphs and their buffers"]


@pytest.mark.parametrize(
    ("sizes", "peak"),
    [
        # two buffers of 160, the last gradient before it is copied there, nothing exchanged before the end
        ([100, 60], 2 * (320 + 100)),
        # what is full is copied, and a part of its largest gradient becomes float32, beside the gradient that found it full
        ([90, 100, 60], 2 * (320 + 160 + 90) + 4 * 50),
        # larger than a buffer: it waits as it is, and is copied
        ([10, 300], 2 * (320 + 300 + 210 + 10) + 4 * 50),
    ],
)
def test_gradients_in_buckets(sizes: list[int], peak: int):
    """Half-width gradients come last to first; buckets hold 160 entries, of which a rank keeps 50."""
    parameters = [torch.nn.Parameter(torch.empty(size, dtype=torch.bfloat16, device="meta")) for size in sizes]
    buckets = GradientBuckets(parameters, 160, 50)
    with Allocations() as counted:
        for parameter in reversed(parameters):
            parameter.grad = torch.empty_like(parameter)
            buckets._take(parameter)
        assert counted.peak == peak
        buckets.finish()
        assert counted.live == 0


def test_gradients_of_layers():
    """A layer's are copied once all are there, and the copy stays until the next layer's; those of no layer wait for the end."""
    head, second, first = ([torch.nn.Parameter(torch.empty(s, dtype=torch.bfloat16, device="meta")) for s in sizes]
                           for sizes in ([500], [100, 20], [30]))  # fmt: skip
    layers = {id(p): number for number, layer in enumerate((first, second)) for p in layer}
    gradients = LayerGradients([*head, *first, *second], layers)
    with Allocations() as counted:
        for parameters, live in [
            (head, 2 * 500),
            (second[:1], 2 * (500 + 100)),
            (second[1:], 2 * 500 + 4 * 120),
            (first, 2 * 500 + 4 * 30),
        ]:
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
                gradients._take(parameter)
            assert counted.live == live
        assert counted.peak == 2 * (500 + 120) + 4 * 120
        gradients.finish()
        assert (counted.live, counted.peak) == (0, (2 + 4) * 500)


def test_the_image_of_the_weights_is_what_is_published(tmp_path: Path):
    config = lab_config(tmp_path, "rollout.servers=['http://127.0.0.1:1']")
    weights = dict(load_policy(config.model).trainable())
    publisher = Publisher()
    size = publisher.publish(0, weights, weights).offer.size
    publisher.close()
    assert make_plan(config).trainer.held["image of the weights, for workers"] == size
    apart = make_plan(config, on_cpu=False).trainer
    assert apart.host["image of the weights, for workers"] == size
    assert "image of the weights, for workers" not in apart.held


def test_the_first_rank_alone_has_the_image_that_workers_are_sent(tmp_path: Path):
    """Ranks that train by divided weights, and generate nowhere, have no whole ones on a device."""
    settings = ("train.parallel=fsdp2", "rollout.servers=['http://127.0.0.1:1']", "model.dtype=bfloat16")
    first, others, worker = make_plan(lab_config(tmp_path, *settings), 4, on_cpu=False).processes
    assert [p.count for p in (first, others, worker)] == [1, 3, 1]
    copy = "weights the engine generates with"
    assert first.held[copy] == others.held[copy] == 0
    assert first.host["image of the weights, for workers"] >= worker.held["weights"]
    assert not any(others.host.values())
    assert (first.held, first.phases) == (others.held, others.phases)
    [all_alike] = make_plan(lab_config(tmp_path, settings[0], settings[2]), 4, on_cpu=False).processes
    assert all_alike.held[copy] == worker.held["weights"]


def test_a_process_that_only_generates_is_refused_where_it_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A rollout server and an evaluation, before weights are loaded; the setting that it names makes it fit."""
    config = lab_config(tmp_path, "rollout.max_rows=32")
    roomy = plan_generation(config, 64, on_cpu=True)
    monkeypatch.setattr(fit, "device_bytes", lambda model: roomy.largest - MIB)
    monkeypatch.setattr("e3rl.models.load_policy", lambda *a, **k: pytest.fail("weights are loaded"))
    recipe = tmp_path / "server.toml"
    recipe.write_text(to_toml(config))
    assert main(["rollout-server", str(recipe), "--port", "0", "--longest-prompt", "64"]) == 2
    with pytest.raises(UserError, match="at the worst moment of a process that generates") as told:
        fit.require_generation_fits(config, 64)
    [budget] = re.findall(r"fits with rollout\.kv_budget=(\d+): ", str(told.value))
    fit.require_generation_fits(replace(config, rollout=replace(config.rollout, kv_budget=int(budget))), 64)
    monkeypatch.setattr(fit, "device_bytes", lambda model: roomy.held["weights"] // 2)
    with pytest.raises(UserError, match="take a device with more memory"):
        fit.require_generation_fits(config, 64)
    assert (
        main(["eval", config.model.path, "lab:chain:1", "--recipe", str(recipe), "--output", str(tmp_path / "e")]) == 2
    )


def test_workers_that_ray_starts_are_part_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = lab_config(tmp_path, "rollout.workers=2", "rollout.max_rows=4096", "train.micro_batch_tokens=64")
    plan = make_plan(config)
    worker = plan.processes[-1]
    assert plan.trainer.largest < worker.largest
    monkeypatch.setattr(fit, "device_bytes", lambda model: plan.trainer.largest)
    with pytest.raises(UserError, match="at the worst moment of a rollout worker"):
        fit.require_fit(config, 1)


def _step(config: Config, tokens: int, siblings: int = 2) -> tuple[int, int]:
    """Bytes of a real step of two groups at its worst moment, beside what is held; tokens of its largest row."""
    policy = load_policy(config.model)
    learner = Learner(policy, build(config.objective), config, updates=4)
    sizes = [[tokens // 4] * 4] * siblings
    groups = [rewarded_group(name, [1.0, 0.0] * (siblings // 2), sizes) for name in ("first", "second")]
    row = max(packed_size(group_sequences([g.group], False)) for g in groups)
    learner.learn(groups, 0)  # AdamW makes its state
    with Allocations() as counted:
        learner.learn(groups, 1)
    return counted.peak, row


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_a_step(model: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A whole step of the learner, a group a row, against the phases of the plan at that row's size."""
    monkeypatch.setattr(attribution, "attention_behind", _by_matrix)
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
