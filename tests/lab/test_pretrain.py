"""Pre-training: repeatable bit for bit, and it learns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from e3rl.lab.pretrain import Schedule, build_model, collate, encode, learning_rate_factor, pretrain
from e3rl.lab.problems import generate
from e3rl.lab.tokenizer import build_tokenizer

SHORT = Schedule(steps=8, batch=4, warmup=2, mixture=("lab:chain:1", "lab:path:1"), pool=64)


@pytest.fixture
def one_thread():  # type: ignore[no-untyped-def]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(schedule: Schedule) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    losses: list[list[float]] = []
    model, _ = pretrain(schedule, lambda step, values: losses.append(values))
    return model.state_dict(), losses


@pytest.mark.usefixtures("one_thread")
def test_one_seed_gives_the_same_weights_and_every_loss_falls() -> None:
    weights, losses = run(SHORT)
    again, losses_again = run(SHORT)
    assert losses == losses_again
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert abs(losses[0][0] - math.log(102)) < 0.5  # at first every token is about as likely as any other
    for family in range(2):
        assert losses[-1][family] < 0.75 * losses[0][family]


@pytest.mark.usefixtures("one_thread")
def test_another_seed_gives_other_weights() -> None:
    _, losses = run(replace(SHORT, steps=1))
    _, others = run(replace(SHORT, steps=1, seed=1))
    assert losses != others


def test_only_the_solution_is_learned() -> None:
    tokenizer = build_tokenizer(64)
    problems = generate("chain", 1, "train", 1) + generate("chain", 2, "train", 1)
    ids, labels = collate([encode(tokenizer, p) for p in problems], tokenizer.pad_token_id)
    for problem, row, label in zip(problems, ids, labels, strict=True):
        text = f"<|begin|><|user|>{problem.prompt}<|end|><|assistant|>{problem.columns['solution']}<|end|>"
        assert tokenizer.decode(row[row != tokenizer.pad_token_id]) == text
        assert tokenizer.decode(label[label != -100]) == f"{problem.columns['solution']}<|end|>"
        assert torch.equal(row[label != -100], label[label != -100])


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    schedule = Schedule(steps=100, warmup=10)
    factors = [learning_rate_factor(step, schedule) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1
    assert factors[55] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)


def test_the_model_is_small_enough_to_come_with_the_package() -> None:
    model = build_model(build_tokenizer(64))
    assert sum(p.numel() for p in model.parameters()) == 702_720
