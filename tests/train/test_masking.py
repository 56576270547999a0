"""Responses cut off at the length limit: in no loss where the settings say so, but in their siblings' advantages."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from e3rl.objectives import build
from e3rl.settings import ObjectiveConfig
from e3rl.train.lessons import Lesson, group_signals, totals_of, train_batch
from e3rl.train.packing import group_sequences
from e3rl.train.scoring import Scores
from tests.train.rollouts import rewarded_group

REWARDS = [1.0, 0.0, 1.0, 0.0]


def lessons_of(name: str, masks: bool, finishes: list[str]) -> tuple[list[Lesson], float, torch.Tensor]:
    """Lessons of one group, their loss, and its gradient by token."""
    made = rewarded_group("p", REWARDS, [[3, 2], [4, 4], [2], [5, 1]])
    cut = tuple(replace(t, finish=finish) for t, finish in zip(made.group.trajectories, finishes, strict=True))
    sequences = group_sequences([replace(made.group, trajectories=cut)], False, masks)
    objective = build(ObjectiveConfig(name, {"kl_coef": 0.0} if name != "erpo" else {}))
    scored = [
        (s, Scores(s.rollout_logprobs_T, torch.ones_like(s.rollout_logprobs_T), shares(s)), None) for s in sequences
    ]
    advantages_GT = objective.advantages(group_signals(scored, REWARDS)).float()
    lessons = [
        Lesson(s, scores, None, row_T[: len(s.response_ids)], len(scored))
        for (s, scores, _), row_T in zip(scored, advantages_GT, strict=True)
    ]
    longest = max(len(s.response_ids) for s in sequences)
    logprobs_ST = torch.zeros(len(sequences), longest)
    for row, s in enumerate(sequences):
        logprobs_ST[row, : len(s.response_ids)] = s.rollout_logprobs_T
    logprobs_ST.requires_grad_()
    loss = objective.loss(train_batch(lessons, logprobs_ST, totals_of(sequences, 64))).value
    (gradient_ST,) = torch.autograd.grad(loss, logprobs_ST)
    return lessons, float(loss.detach()), gradient_ST


def shares(sequence):
    size = len(sequence.response_ids)
    return torch.arange(1, size + 1) / (size * (size + 1) / 2)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "sapo", "cispo", "rloo", "luspo", "vespo", "e3rl"])
def test_a_cut_off_response_moves_nothing_and_counts_for_its_siblings(name: str):
    finishes = ["stop", "length", "stop", "stop"]
    plain, _, before_ST = lessons_of(name, False, finishes)
    masked, loss, after_ST = lessons_of(name, True, finishes)
    for a, b in zip(plain, masked, strict=True):
        assert torch.equal(a.advantages_T, b.advantages_T)  # its reward is in the group's mean and spread as before
    assert before_ST[1].abs().sum() > 0
    assert after_ST[1].abs().sum() == 0
    of_all, of_rest = tokens(plain, {0, 1, 2, 3}), tokens(plain, {0, 2, 3})
    factor = dict.fromkeys(
        ("grpo", "dapo", "cispo", "vespo"), of_all / of_rest
    )  # means over the tokens that are learnt from
    for row in (0, 2, 3):
        torch.testing.assert_close(after_ST[row], before_ST[row] * factor.get(name, 1.0))
    assert math.isfinite(loss)


def tokens(lessons: list[Lesson], rows: set[int]) -> int:
    return sum(len(lesson.sequence.response_ids) for row, lesson in enumerate(lessons) if row in rows)


def test_a_step_of_cut_off_responses_alone_changes_nothing():
    _, loss, gradient_ST = lessons_of("grpo", True, ["length"] * 4)
    assert loss == 0
    assert gradient_ST.abs().sum() == 0
