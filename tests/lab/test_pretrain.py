"""Pre-training: repeatable bit for bit, and it learns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from e3rl.lab.pretrain import Schedule, build_model, collate, encode, pretrain
from e3rl.lab.problems import generate
from e3rl.lab.tokenizer import build_tokenizer

NAMES = ("lab:chain:1", "lab:path:1")
SHORT = Schedule(steps=8, mixture=dict.fromkeys(NAMES, 4), warmup=2, pool=64)


@pytest.fixture
def one_thread():  # type: ignore[no-untyped-def]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(schedule: Schedule) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    losses: list[dict[str, float]] = []
    model, _ = pretrain(schedule, lambda step, values: losses.append(values))
    return model.state_dict(), losses


@pytest.mark.usefixtures("one_thread")
def test_one_seed_gives_the_same_weights_and_every_loss_falls() -> None:
    weights, losses = run(SHORT)
    again, losses_again = run(SHORT)
    assert losses == losses_again
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    for name in NAMES:
        assert abs(losses[0][name] - math.log(103)) < 0.5  # at first all tokens are about equally likely
        assert losses[-1][name] < 0.8 * losses[0][name]


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


def test_the_model_is_small_enough_to_come_with_the_package() -> None:
    model = build_model(build_tokenizer(64))
    assert sum(p.numel() for p in model.parameters()) == 702_720
