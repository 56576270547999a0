"""A line of metrics.jsonl, worked by hand."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch

from e3rl.rollout.metric import toy_candidate
from e3rl.train.collect import StepGroups
from e3rl.train.learner import Update
from e3rl.train.lessons import Lesson
from e3rl.train.packing import trajectory_sequence
from e3rl.train.scoring import Scores
from e3rl.train.step_metrics import (
    lesson_metrics,
    order_metrics,
    reward_metrics,
    rollout_metrics,
    segment_metrics,
    sign_flip_share,
    staleness,
    step_record,
)
from e3rl.types import (
    Candidate,
    Group,
    Problem,
    Prompt,
    Reward,
    RewardedGroup,
    Segment,
    Trajectory,
    Verdict,
)
from tests.rollout.worlds import levels, roll
from tests.train.rollouts import judgement

TABLE = {("p", 0, 0, 0): 2.0, **{("p", 1, 1, e): 3.0 for e in range(3)}}
"""Sibling 0 is erased once at segment 0; sibling 1 is erased twice at segment 1 and then forced."""


def group() -> Group:
    """Two siblings of three segments of two tokens."""
    return roll(levels(TABLE))[0]["p"]


def rewarded(*values: float | None, item: Group | None = None) -> RewardedGroup:
    return RewardedGroup(item or group(), tuple(Reward(v, {"first": v, "other": 9.0}) for v in values))


def lesson(sibling: int, advantages: list[float], gap: float = 0.0, place: int = 0) -> Lesson:
    """A trajectory whose trainer's log-probabilities are the engine's plus ``gap``."""
    sequence = trajectory_sequence(group().trajectories[sibling], place)
    logprobs_T = sequence.rollout_logprobs_T + gap
    return Lesson(sequence, Scores(logprobs_T, logprobs_T, None), None, torch.tensor(advantages), 2)


def test_by_segment_first_candidates_that_were_accepted_are_counted():
    found = segment_metrics([rewarded(1.0, 0.0)], [])
    assert found["acceptance"] == [0.5, 0.5, 1.0]
    assert found["uncertainty"] == pytest.approx([0.5, (0.5 + 3.0) / 2, 0.5])
    assert found["threshold"] == found["baseline"] == pytest.approx([1.0] * 3)
    assert found["penalty"] == found["modulation"] == pytest.approx([1.0] * 3)
    assert found["advantage"] == []


def test_advantages_are_means_of_each_segments_tokens():
    lessons = [lesson(0, [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]), lesson(1, [-1.0] * 6)]
    assert segment_metrics([], lessons)["advantage"] == [0.0, 0.5, 1.0]
    erased = replace(lessons[1], sequence=replace(lessons[1].sequence, erased=True))
    assert segment_metrics([], [lessons[0], erased])["advantage"] == [1.0, 2.0, 3.0]


def test_rewards_that_are_missing_count_as_missing_alone():
    found = reward_metrics([rewarded(1.0, None), rewarded(0.0, 0.5), rewarded(1.0, 1.0)])
    assert found == {
        "reward": pytest.approx(3.5 / 5),
        "reward_std": pytest.approx(statistics.stdev([1.0, 0.0, 0.5, 1.0, 1.0])),
        "rewards/first/mean": pytest.approx(3.5 / 5),
        "rewards/first/std": pytest.approx(statistics.stdev([1.0, 0.0, 0.5, 1.0, 1.0])),
        "rewards/other/mean": 9.0,
        "rewards/other/std": 0.0,
        "accuracy": 3 / 5,
        "reward_missing": 1,
        "degenerate_groups": pytest.approx(2 / 3),
    }


def test_lengths_of_the_shortest_the_longest_and_those_that_ended():
    first, second = group().trajectories
    short = replace(first, segments=first.segments[:2], finish="stop")
    found = rollout_metrics([rewarded(1.0, 0.0, item=replace(group(), trajectories=(short, second)))])
    assert (found["length_min"], found["length_max"], found["length_finished"]) == (4, 6, 4)
    assert math.isnan(rollout_metrics([rewarded(1.0, 0.0)])["length_finished"])


def test_what_was_rolled_out():
    found = rollout_metrics([rewarded(1.0, 0.0)])
    assert (found["candidates"], found["erasures"], found["segments"], found["length"]) == (9, 3, 3, 6)
    assert (found["committed_tokens"], found["erased_tokens"], found["tokens"]) == (12, 6, 18)
    assert (found["erase_rate"], found["r"], found["forced_rate"]) == pytest.approx((3 / 9, 6 / 12, 1 / 6))
    assert found["entropy"] == pytest.approx((5 * 0.5 + 3.0) / 6), "of what was committed"
    assert (found["finish_ratio"], found["kept_mass"]) == (0.0, 1.0)
    shown = replace(group(), policy_version=None)
    assert rollout_metrics([rewarded(1.0, 0.0, item=shown)])["tokens"] == 0


def test_the_mismatch_is_of_tokens_and_the_effective_sample_size_of_trajectories():
    found = lesson_metrics([lesson(0, [0.0] * 6, gap=0.1), lesson(1, [0.0] * 6, gap=-0.3)])
    assert (found["mismatch_mean"], found["mismatch_max"]) == pytest.approx((0.2, 0.3), abs=1e-6)
    one, other = math.exp(0.6), math.exp(-1.8)
    assert found["mismatch_ess"] == pytest.approx((one + other) ** 2 / (one**2 + other**2) / 2, abs=1e-5)
    assert lesson_metrics([]) == {}


def test_sign_flips_are_counted_group_by_group():
    """The sibling above its group's mean has 2 of 6 tokens below 0, the other none of 6 above; a group alike has no sides."""
    lessons = [
        lesson(0, [1.0] * 4 + [-1.0] * 2),
        lesson(1, [-1.0] * 6),
        *(lesson(i, [1.0] * 6, place=1) for i in (0, 1)),
    ]
    items = [rewarded(1.0, 0.0), rewarded(1.0, 1.0)]
    assert sign_flip_share(lessons, items) == pytest.approx(2 / 12)
    assert math.isnan(sign_flip_share([], items))


def test_a_step_is_said_of_dropped_groups_too_and_adds_up_the_tokens():
    position = {"epoch": 1, "position": 3, "prompts": 4}
    groups = StepGroups((rewarded(1.0, 0.0),), (rewarded(1.0, 1.0),), 1, 1.0, 2.0, position)
    rest = {"version": 7, "tokens_before": 100, "reward_restarts": 4}
    record = step_record(3, groups, [], Update({"loss": 2.0}, 0.1, 1e-4), train_seconds=3.0, **rest)
    assert (record["groups_kept"], record["refills"], record["dropped_tokens"]) == (1, 1, 18)
    assert (record["tokens"], record["tokens_total"], record["tokens_per_second"]) == (36, 136, 6.0)
    assert (record["reward"], record["degenerate_groups"], record["loss"]) == (0.75, 0.5, 2.0)
    assert (record["step"], record["epoch"], record["reward_restarts"], record["staleness"]) == (3, 1.75, 4, 2.0)


def test_staleness_is_the_age_of_the_weights_that_drew_each_candidate():
    """All by version 5; then one segment by version 6."""
    found = staleness([rewarded(1.0, 0.0)], 7)
    assert found == {"staleness": 2.0, "staleness_most": 2}
    item = group()
    first, *rest = item.trajectories
    newer = replace(first.segments[0], candidate=first.segments[0].candidate.drawn_by(6))
    mixed = replace(item, trajectories=(replace(first, segments=(newer, *first.segments[1:])), *rest))
    candidates = sum(len(t.segments) + len(t.erasures) for t in item.trajectories)
    found = staleness([rewarded(1.0, 0.0, item=mixed)], 7)
    assert found == {"staleness": pytest.approx(2 - 1 / candidates), "staleness_most": 2}


def test_demonstrations_have_no_staleness():
    trajectories = tuple(
        replace(
            t,
            segments=tuple(
                replace(s, candidate=Candidate.wrap(*s.candidate.columns(), ended=True)) for s in t.segments
            ),
            erasures=(),
        )
        for t in group().trajectories
    )
    shown = replace(group(), trajectories=trajectories, policy_version=None)
    assert all(math.isnan(n) for n in staleness([rewarded(1.0, 0.0, item=shown)], 7).values())


def test_how_well_u_orders_siblings_by_their_rewards() -> None:
    """Three siblings: at the first segment the worst has the largest U, the middle one is above the best by a tie's half; at
    the second, which the best one lacks, the two others are the wrong way round. Without judgements or pairs: nothing."""

    def judged(*totals: float) -> Trajectory:
        segments = [Segment(n, toy_candidate(), judgement(Verdict.COMMIT, 0, u, 9.0)) for n, u in enumerate(totals)]
        return Trajectory(Prompt(Problem("p", ""), (1,)), 0, tuple(segments), (), "stop")

    siblings = judged(3.0, 0.1), judged(1.0, 0.2), judged(1.0)
    rewards = tuple(Reward(v, {}) for v in (0.0, 0.5, 1.0))
    item = RewardedGroup(Group(siblings[0].prompt, siblings, 0), rewards)
    assert order_metrics([item]) == {"uncertainty_auroc": pytest.approx((1 + 1 + 0.5 + 0) / 4)}
    assert order_metrics([replace(item, rewards=(Reward(None, {}), *rewards[1:]))])["uncertainty_auroc"] == 0.5
    assert order_metrics([replace(item, rewards=(rewards[0],) * 3)]) == {}
