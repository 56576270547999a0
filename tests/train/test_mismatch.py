"""Importance weights from engine to trainer: by value, by gradient, for every objective, and 1 where the two agree."""

from __future__ import annotations

import copy
import dataclasses
import math
import random

import pytest
import torch
from torch import Tensor

from e3rl.config import Config, ObjectiveConfig, RolloutConfig, TrainConfig
from e3rl.models import Policy
from e3rl.objectives import OBJECTIVES, build
from e3rl.objectives.base import TrainBatch
from e3rl.train.learner import Learner
from e3rl.train.lessons import Lesson, importance_weights, weigh_gradient
from e3rl.train.metrics import METRICS, Means
from e3rl.train.packing import TrainSequence
from e3rl.train.step_metrics import importance_metrics
from tests.engine.models import EOS, tiny
from tests.objectives.support import batch_of, make, random_group
from tests.train.rollouts import rewarded_group

MODES = tuple(f"{level}_{action}" for level in ("token", "segment", "sequence") for action in ("truncate", "mask"))
GROUPS = [
    rewarded_group("first", [1.0, 0.0, 1.0], [[4, 2], [4, 4, 1], [3]], [[0], [1], []]),
    rewarded_group("second", [0.0, 1.0, 0.5], [[4], [4, 3], [2]]),
]


def plain_weights(
    trainer: list[float], engine: list[float], mask: list[bool], segments: list[int], mode: str, cap: float
) -> list[float]:
    """The same in plain Python numbers, a token at a time."""
    level, action = mode.split("_")
    weights = []
    for t in range(len(trainer)):
        everywhere = range(len(trainer))
        same = [m for m in everywhere if segments[m] == segments[t]]
        members = {"token": [t], "segment": same, "sequence": everywhere}[level]
        ratio = math.prod(math.exp(trainer[m]) / math.exp(engine[m]) for m in members if mask[m])
        if not mask[t]:
            ratio = 0.0
        elif ratio > cap:
            ratio = cap if action == "truncate" else 0.0
        weights.append(ratio)
    return weights


def tensors(
    trainer: list[float], engine: list[float], mask: list[bool], segments: list[int]
) -> tuple[Tensor, TrainSequence]:
    size = len(trainer)
    sequence = TrainSequence(
        prompt_ids=(5,),
        response_ids=tuple(range(size)),
        segments_T=torch.tensor(segments),
        mask_T=torch.tensor(mask),
        rollout_logprobs_T=torch.tensor(engine).double(),
        group=0,
        sibling=0,
        erased=False,
    )
    return torch.tensor(trainer).double(), sequence


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_those_of_the_plain_computation(mode: str):
    rng = random.Random(mode)
    limited = 0
    for _ in range(50):
        size, cap = rng.randint(1, 6), rng.choice([0.5, 1.0, 2.0])
        trainer, engine = ([rng.uniform(-3, 0) for _ in range(size)] for _ in range(2))
        mask = [rng.random() < 0.8 for _ in range(size)]
        segments = sorted(rng.randint(-1, 2) for _ in range(size))
        found = importance_weights(*tensors(trainer, engine, mask, segments), mode, cap)
        expected = plain_weights(trainer, engine, mask, segments, mode, cap)
        assert found.weights_T.tolist() == pytest.approx(expected, rel=1e-6)
        assert not bool(found.limited_T[~torch.tensor(mask)].any())
        limited += int(found.limited_T.sum())
    assert limited > 20


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [2.0, 0.5, 1.5]),
        ("token_mask", [0.0, 0.5, 1.5]),
        ("segment_truncate", [2.0, 0.75, 0.75]),
        ("segment_mask", [0.0, 0.75, 0.75]),
        ("sequence_truncate", [2.0, 2.0, 2.0]),
        ("sequence_mask", [0.0, 0.0, 0.0]),
    ],
)
def test_weights_by_hand(mode: str, expected: list[float]):
    """Ratios 4, 1/2 and 3/2: the sequence's is 3, that of its second segment 3/4."""
    trainer = [math.log(0.8), math.log(0.1), math.log(0.3)]
    engine = [math.log(0.2), math.log(0.2), math.log(0.2)]
    found = importance_weights(*tensors(trainer, engine, [True] * 3, [0, 1, 1]), mode, 2.0)
    assert found.weights_T.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("mode", MODES)
def test_where_engine_and_trainer_agree_every_weight_is_one(mode: str):
    found = importance_weights(*tensors([-1.0, -2.0], [-1.0, -2.0], [True, True], [0, 1]), mode, 2.0)
    assert found.weights_T.tolist() == [1.0, 1.0]
    assert not found.limited_T.any()


def test_a_token_that_the_engine_held_impossible_is_limited_not_infinite():
    for mode, weight in (("token_truncate", 2.0), ("token_mask", 0.0)):
        found = importance_weights(*tensors([-1.0], [-math.inf], [True], [0]), mode, 2.0)
        assert found.weights_T.tolist() == [weight]


def test_weighing_leaves_values_alone_and_multiplies_gradients():
    logprobs = torch.tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
    weighed = weigh_gradient(logprobs, torch.tensor([[2.0, 0.0, 0.25]]))
    assert weighed.tolist() == logprobs.tolist()
    (weighed * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert logprobs.grad.tolist() == [[2.0, 0.0, 25.0]]


def gradient(name: str, batch: TrainBatch, weights_ST: Tensor) -> tuple[float, Tensor]:
    logprobs_ST = batch.logprobs_ST.detach().clone().requires_grad_()
    loss = make(name).loss(dataclasses.replace(batch, logprobs_ST=weigh_gradient(logprobs_ST, weights_ST)))
    return float(loss.value.detach()), torch.autograd.grad(loss.value, logprobs_ST)[0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objectives_gradient_is_weighed_token_by_token(name: str):
    """Clip decisions and KL included: the gradient is the unweighted one times the weight of its token."""
    batch = batch_of(random_group(random.Random(3), 5), groups=1)
    weights_ST = torch.rand(batch.logprobs_ST.shape, dtype=batch.logprobs_ST.dtype) * 2
    plain_value, plain_ST = gradient(name, batch, torch.ones_like(weights_ST))
    value, found_ST = gradient(name, batch, weights_ST)
    assert value == pytest.approx(plain_value)
    torch.testing.assert_close(found_ST, weights_ST * plain_ST)
    assert name == "vanilla" or plain_ST.abs().max() > 0


def learner(train: TrainConfig, objective: str = "grpo") -> Learner:
    config = Config(
        objective=ObjectiveConfig(objective, {}), rollout=RolloutConfig(segment_length=4, max_segments=3), train=train
    )
    model = copy.deepcopy(tiny("Qwen3"))
    return Learner(Policy(model, None, "tiny", EOS, 256), build(config.objective), config, updates=4)


def model_gradient(made: Learner, lessons: list[Lesson]) -> Tensor:
    made._policy.model.train()
    made._accumulate(lessons, Means())
    return torch.cat([p.grad.flatten() for p in made._policy.model.parameters() if p.grad is not None])


def test_without_a_correction_lessons_carry_no_weights_and_no_metrics():
    lessons = learner(TrainConfig()).prepare(GROUPS)
    assert all(lesson.importance is None for lesson in lessons)
    assert importance_metrics(lessons) == {}


@pytest.mark.parametrize("mode", MODES)
def test_the_learner_weighs_by_its_own_log_probabilities_over_the_engines(mode: str):
    cap = 0.05 if mode.startswith("token") else 1e-4  # ratios here are small: the engine's numbers are made up
    made = learner(TrainConfig(importance_correction=mode, importance_cap=cap), "e3rl")
    lessons = made.prepare(GROUPS)
    for lesson in lessons:
        trainer, engine = lesson.scores.logprobs_T.tolist(), lesson.sequence.rollout_logprobs_T.tolist()
        mask, segments = lesson.sequence.mask_T.tolist(), lesson.sequence.segments_T.tolist()
        expected = plain_weights(trainer, engine, mask, segments, mode, cap)
        assert lesson.importance.weights_T.tolist() == pytest.approx(expected, rel=1e-4)
    found = importance_metrics(lessons)
    weights = [w for lesson in lessons for w in lesson.importance.weights_T.tolist()]
    assert found["importance_weight"] == pytest.approx(sum(weights) / len(weights))
    assert 0 < found["importance_limited"] < 1
    assert set(found) <= set(METRICS)


def test_a_weight_of_zero_takes_the_sequence_out_of_the_models_gradient():
    """Sequence weights of 1 for one response and 0 for all others leave that response's gradient alone."""
    made = learner(TrainConfig(importance_correction="sequence_mask"))
    lessons = made.prepare(GROUPS)
    only = [
        dataclasses.replace(
            lesson,
            importance=dataclasses.replace(
                lesson.importance, weights_T=torch.full_like(lesson.advantages_T, float(i == 1))
            ),
        )
        for i, lesson in enumerate(lessons)
    ]
    silent = [
        dataclasses.replace(lesson, importance=None, advantages_T=lesson.advantages_T * float(i == 1))
        for i, lesson in enumerate(lessons)
    ]
    plain = learner(TrainConfig())
    without_kl = {"kl_coef": 0.0}
    for each in (made, plain):
        each._objective = make("grpo", **without_kl)
    weighed, expected = model_gradient(made, only), model_gradient(plain, silent)
    torch.testing.assert_close(weighed, expected, atol=1e-6, rtol=1e-4)
    assert expected.abs().max() > 1e-4
