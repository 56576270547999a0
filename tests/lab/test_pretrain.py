"""Pre-training: repeatable bit for bit, and it learns."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from e3rl.lab.pretrain import MAZE, TOOLS, Schedule, build_model, collate, encode, pretrain
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


def test_only_the_calls_and_the_answer_are_learned() -> None:
    tokenizer = build_tokenizer(256, tools=True)
    [problem] = generate("books", 1, "train", 1)
    ids, labels = encode(tokenizer, problem, tools=True)
    learned = tokenizer.decode([token for token in labels if token != -100])
    sums = re.findall("<arg_value>(.*?)</arg_value>", str(problem.columns["solution"]))
    calls = [f"<tool_call>book<arg_key>sum</arg_key><arg_value>{s}</arg_value></tool_call><|end|>" for s in sums]
    assert learned == "".join(calls) + f"A:{problem.answer}<|end|>"
    said = [*problem.columns["operations"][1:], "ok"]
    turns = "".join(f"{call}<|tool|>{told}<|end|><|assistant|>" for call, told in zip(calls, said, strict=True))
    head = f"<|begin|><|system|>book(sum)<|end|><|user|>{problem.prompt}<|end|><|assistant|>"
    assert tokenizer.decode(ids) == f"{head}{turns}A:{problem.answer}<|end|>"


@pytest.mark.usefixtures("one_thread")
def test_the_tool_model_learns_its_calls() -> None:
    _, losses = run(replace(TOOLS, steps=6, mixture={"lab:books:1": 4}, warmup=2, pool=64))
    assert losses[-1]["lab:books:1"] < 0.8 * losses[0]["lab:books:1"]


@pytest.mark.usefixtures("one_thread")
def test_the_maze_model_learns_searches_as_they_are_demonstrated_and_goes_on_from_a_stage_to_the_next() -> None:
    first, second = (replace(schedule, steps=4, mixture={"lab:maze:1": 4}, warmup=2, pool=64) for schedule in MAZE)
    losses: list[float] = []
    model, _ = pretrain(first, lambda step, values: losses.extend(values.values()))
    again, _ = pretrain(replace(second, decay=2), lambda step, values: losses.extend(values.values()), model)
    assert again is model
    assert losses[4] < 0.8 * losses[0]  # where the first stage ended
    assert losses[-1] < losses[4]


def test_a_response_can_be_other_than_the_solution() -> None:
    tokenizer = build_tokenizer(64)
    [problem] = generate("chain", 1, "train", 1)
    _, labels = encode(tokenizer, problem, response="A:00")
    assert tokenizer.decode([token for token in labels if token != -100]) == "A:00<|end|>"


def test_the_learning_rate_rises_and_may_fall_at_the_end() -> None:
    assert [replace(SHORT, warmup=2, steps=6, decay=4).rate(step) for step in range(6)] == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert [replace(SHORT, warmup=2, steps=6).rate(step) for step in range(6)] == [0.5, 1, 1, 1, 1, 1]
