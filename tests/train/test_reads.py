"""A training step asks the device for scores, metrics and norms, and for nothing else: counted on a stand-in device."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from e3rl.config import Config, ObjectiveConfig, RolloutConfig, TrainConfig
from e3rl.engine.torch import operations
from e3rl.models import Policy
from e3rl.objectives import build
from e3rl.testing.reads import META, DeviceReads
from e3rl.train.learner import Learner
from tests.engine.models import EOS, tiny
from tests.train.rollouts import rewarded_group

GROUPS = [
    rewarded_group("first", [1.0, 0.0, 1.0], [[4, 2], [4, 4, 1], [3]]),
    rewarded_group("second", [0.0, 1.0, 0.5], [[4], [4, 3], [2]]),
]
A_ROW = {
    "train/scoring.py:by_sequence": 1,  # scores; shares are one more
    "objectives/metrics.py:measured": 1,
    "train/nonfinite.py:find_nonfinite": 1,
    "train/learner.py:_backward": 1,  # the loss
}
OF_SEGMENTS = {"objectives/metrics.py:measured": 1, "objectives/metrics.py:measured_by_segment": 1}


@pytest.mark.parametrize(
    ("objective", "options", "more"),
    [
        ("grpo", {"kl_coef": 0.0}, {}),
        ("dapo", {}, {}),
        ("grpo", {"kl_coef": 0.1}, {"train/scoring.py:by_sequence": 1, "objectives/metrics.py:measured": 1}),
        ("erpo", {}, {"train/scoring.py:by_sequence": 1}),
        (
            "e3rl",
            {"kl_coef": 0.1, "attribution_layers": "all"},
            {**OF_SEGMENTS, "train/scoring.py:by_sequence": 2, "objectives/_common.py:count_segments": 1},
        ),
    ],
)
@pytest.mark.parametrize("family", ["Qwen3", "Mistral"])
def test_a_step_asks_so_often_and_no_more(
    family: str, objective: str, options: dict[str, Any], more: dict[str, int], monkeypatch: pytest.MonkeyPatch
):
    """Groups of several rows, whose gradients are computed again from their layers' inputs."""
    monkeypatch.setattr(operations, "causal_lower_right", lambda *sizes: None)  # can't be made while counting
    model = copy.deepcopy(tiny(family)).to(META)
    config = Config(
        objective=ObjectiveConfig(objective, options),
        rollout=RolloutConfig(segment_length=4, max_segments=3),
        train=TrainConfig(micro_batch_tokens=18, gradient_checkpointing=True),
    )
    learner = Learner(Policy(model, None, "tiny", EOS, 256), build(config.objective), config, updates=1)
    backward, rows = learner._backward, 0

    def counted(*arguments: Any) -> float:
        nonlocal rows
        rows += 1
        return backward(*arguments)

    monkeypatch.setattr(learner, "_backward", counted)
    with DeviceReads() as found:
        learner.learn(GROUPS, 0)
    assert rows > len(GROUPS)
    allowed = {place: (A_ROW.get(place, 0) + more.get(place, 0)) * rows for place in {*A_ROW, *more}}
    allowed["train/optimizer.py:_clip"] = 2
    assert all(count <= allowed.get(place, 0) for place, count in found.reads.items()), found.reads
