"""The master-weight optimizer and the learning-rate schedule, by value."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from e3rl.config import TrainConfig, build_config
from e3rl.errors import UserError
from e3rl.train.optimizer import MasterOptimizer, learning_rate, state_width

CONFIG = TrainConfig(learning_rate=0.1, warmup_ratio=0.0, max_grad_norm=1.0)


def test_the_schedules_by_hand():
    warm = replace(CONFIG, warmup_ratio=0.2)  # 2 of 10 updates
    assert [round(learning_rate(warm, u, 10), 6) for u in (0, 1, 2, 9)] == [0.05, 0.1, 0.1, 0.1]
    begun = replace(CONFIG, warmup_ratio=0.11)  # an update that is begun counts as one
    assert [round(learning_rate(begun, u, 10), 6) for u in (0, 1, 2)] == [0.05, 0.1, 0.1]
    linear = replace(warm, lr_scheduler_type="linear")  # 8 updates from 0.1 towards 0
    assert learning_rate(linear, 2, 10) == pytest.approx(0.1)
    assert learning_rate(linear, 6, 10) == pytest.approx(0.1 * 4 / 8)
    cosine = replace(warm, lr_scheduler_type="cosine")
    assert learning_rate(cosine, 6, 10) == pytest.approx(0.05 * (1 - math.cos(math.pi * 0.5)))


def _parameter(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=dtype))


def test_one_step_by_hand():
    """Gradient (30, 40) has norm 50 and is scaled to (0.6, 0.8); AdamW's first step moves by the rate in its sign."""
    parameter = _parameter(torch.float32)
    optimizer = MasterOptimizer([("w", parameter)], CONFIG)
    parameter.grad = torch.tensor([[30.0, -40.0]])
    assert optimizer.step(0.1) == pytest.approx(50.0)
    torch.testing.assert_close(parameter.data, torch.tensor([[2.9, 4.1]]))
    torch.testing.assert_close(optimizer.state()["w/exp_avg"], torch.tensor([[0.06, -0.08]]))
    assert parameter.grad is None


def test_the_moments_forget_as_fast_as_the_settings_say():
    parameter = _parameter(torch.float32)
    optimizer = MasterOptimizer([("w", parameter)], replace(CONFIG, adam_beta1=0.5, adam_beta2=0.75))
    parameter.grad = torch.tensor([[0.6, -0.8]])
    optimizer.step(0.1)
    torch.testing.assert_close(optimizer.state()["w/exp_avg"], torch.tensor([[0.3, -0.4]]))
    torch.testing.assert_close(optimizer.state()["w/exp_avg_sq"], torch.tensor([[0.09, 0.16]]))


def test_matrices_decay_and_vectors_do_not():
    matrix, vector = _parameter(torch.float32), nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = MasterOptimizer([("w", matrix), ("norm", vector)], replace(CONFIG, weight_decay=0.5))
    matrix.grad, vector.grad = torch.zeros_like(matrix), torch.zeros_like(vector)
    optimizer.step(0.1)
    torch.testing.assert_close(matrix.data, torch.tensor([[3.0, 4.0]]) * (1 - 0.1 * 0.5))
    assert vector.tolist() == [3.0, 4.0]


def test_small_updates_are_not_lost_on_bfloat16_weights():
    parameter = _parameter(torch.bfloat16)
    optimizer = MasterOptimizer([("w", parameter)], CONFIG)
    for _ in range(200):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-3)
    torch.testing.assert_close(optimizer.weights()["w"].data, torch.tensor([[2.8, 3.8]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(parameter.data.float(), torch.tensor([[2.8, 3.8]]), atol=0.02, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_changes_nothing(value: float):
    parameter = _parameter(torch.float32)
    optimizer = MasterOptimizer([("w", parameter)], CONFIG)
    parameter.grad = torch.tensor([[1.0, value]])
    assert not math.isfinite(optimizer.step(0.1))
    assert torch.equal(parameter.data, torch.tensor([[3.0, 4.0]]))
    assert optimizer.state() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_on_from_saved_state_gives_the_same_weights(dtype: torch.dtype):
    def run(optimizer: MasterOptimizer, parameters: list[nn.Parameter], steps: range) -> None:
        for step in steps:
            for p in parameters:
                p.grad = torch.full_like(p, math.sin(step + p.numel()))
            optimizer.step(0.01)

    def fresh() -> list[tuple[str, nn.Parameter]]:
        return [("bias", nn.Parameter(torch.ones(3, dtype=dtype))), ("w", _parameter(dtype))]

    decayed = replace(CONFIG, weight_decay=0.1)
    whole = fresh()
    first = MasterOptimizer(whole, decayed)
    run(first, [p for _, p in whole], range(5))
    weights = {k: v.detach().clone() for k, v in first.weights().items()}
    state = {k: v.clone() for k, v in first.state().items()}
    run(first, [p for _, p in whole], range(5, 9))
    resumed = fresh()
    second = MasterOptimizer(resumed, decayed)
    second.load(weights, state)
    run(second, [p for _, p in resumed], range(5, 9))
    for (_, a), (_, b) in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)


def _named() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(7)
    shapes = {"embed_tokens.weight": (72, 64), "layers.0.q.weight": (64, 80), "layers.0.norm.weight": (64,)}
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]


def _learn(optimizer: MasterOptimizer, named: list[tuple[str, nn.Parameter]], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for _, parameter in named:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step(0.01)


@pytest.mark.parametrize("name", ["adamw_fused", "adamw_8bit", "muon"])
def test_every_optimizer_goes_on_from_its_saved_state(name: str):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'e3rl[8bit]'")
    config = replace(CONFIG, optimizer=name, weight_decay=0.1)
    whole, resumed = _named(), _named()
    first, second = MasterOptimizer(whole, config), MasterOptimizer(resumed, config)
    _learn(first, whole, range(3))
    state = {k: v.clone() for k, v in first.state().items()}
    second.load({k: v.detach().clone() for k, v in first.weights().items()}, state)
    _learn(first, whole, range(3, 6))
    _learn(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole, resumed, strict=True))
    kept = sum(v.nbytes for k, v in state.items() if v.numel() > 1 and "qmap" not in k)
    assert kept == sum(int(state_width(n, p, name) * p.numel()) for n, p in whole)


def test_the_fused_kernel_is_adamw():
    plain, fused = _named(), _named()
    _learn(MasterOptimizer(plain, CONFIG), plain, range(4))
    _learn(MasterOptimizer(fused, replace(CONFIG, optimizer="adamw_fused")), fused, range(4))
    for (_, a), (_, b) in zip(plain, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_muon_turns_a_layers_matrix_and_leaves_the_rest_to_adamw():
    named, plain = _named(), _named()
    before = named[1][1].detach().clone()
    _learn(MasterOptimizer(named, replace(CONFIG, optimizer="muon")), named, range(1))
    _learn(MasterOptimizer(plain, CONFIG), plain, range(1))
    change = torch.linalg.svdvals(named[1][1].detach() - before) / (0.01 * 0.2 * math.sqrt(80))
    assert 0.5 < change.min() < change.max() < 1.5  # Newton-Schulz: all singular values near 1
    for place in (0, 2):
        assert torch.equal(named[place][1], plain[place][1])


def test_bitsandbytes_that_is_missing_is_a_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"needs bitsandbytes: pip install 'e3rl\[8bit\]'"):
        MasterOptimizer(_named(), replace(CONFIG, optimizer="adamw_8bit"))


@pytest.mark.parametrize(
    ("optimizer", "parallel", "fine"),
    [
        *(("adamw", p, True) for p in ("none", "zero1", "fsdp2", "deepspeed-zero3")),
        ("adamw_fused", "fsdp2", True),
        ("adamw_fused", "deepspeed-zero2", False),
        ("muon", "ddp", True),
        *(("muon", p, False) for p in ("zero1", "zero2", "fsdp2", "deepspeed-zero2")),
        ("adamw_8bit", "zero1", False),
    ],
)
def test_an_optimizer_that_ranks_can_not_divide_is_refused(optimizer: str, parallel: str, fine: bool):
    tables = {"train": {"optimizer": optimizer, "parallel": parallel}}
    if fine:
        assert build_config(tables).train.optimizer == optimizer
        return
    with pytest.raises(UserError, match=f"'{optimizer}' keeps its state whole, and train.parallel = '{parallel}'"):
        build_config(tables)
