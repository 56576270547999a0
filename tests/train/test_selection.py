"""Weights that make up for what erasing commits oftener than the policy draws it."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch

from e3rl.config import Config, ErasureConfig, RolloutConfig, TrainConfig, build_config
from e3rl.equations.erasure import selection_weight
from e3rl.errors import UserError
from e3rl.train.lessons import Lesson, weighed, with_selection
from e3rl.train.packing import erased_sequences, trajectory_sequence
from e3rl.train.scoring import Scores
from e3rl.types import Verdict
from tests.rollout.worlds import MEAN_ONLY, levels, roll

CASES = [(0.7, 5, 0.0), (0.3, 2, 0.15), (0.0, 3, 0.15), (0.0, 3, 0.0), (1.0, 5, 0.2), (0.5, 0, 0.1)]


@pytest.mark.parametrize(("acceptance", "erasures", "spared"), CASES)
def test_w_is_what_the_state_machine_does(acceptance: float, erasures: int, spared: float) -> None:
    """Attempt by attempt: a candidate that passes is committed, another one by chance or as the last."""
    reached, passing, others = 1.0, 0.0, 0.0
    for attempt in range(erasures + 1):
        last = attempt == erasures
        passing += reached * acceptance
        others += reached * (1 - acceptance) * (1 if last else spared)
        reached *= (1 - acceptance) * (0 if last else 1 - spared)
    if acceptance > 0:
        assert selection_weight(True, acceptance, erasures, spared) == pytest.approx(passing / acceptance)
    if acceptance < 1:
        assert selection_weight(False, acceptance, erasures, spared) == pytest.approx(others / (1 - acceptance))
    assert passing + others == pytest.approx(1)
    assert selection_weight(False, acceptance, erasures, spared) >= spared


def test_weighed_segments_are_the_policy_again() -> None:
    """A gradient that prefers what passes: its mean over kept segments is off, and right when weighed."""
    rng, acceptance, spared, value = Random(0), 0.4, 0.15, {True: 1.0, False: 0.2}
    plain = acceptance * value[True] + (1 - acceptance) * value[False]
    kept, corrected = [], []
    for _ in range(20_000):
        for attempt in range(4):
            passed = rng.random() < acceptance
            if passed or attempt == 3 or rng.random() < spared:
                break
        kept.append(value[passed])
        corrected.append(value[passed] / selection_weight(passed, acceptance, 3, spared))
    assert sum(kept) / len(kept) > plain + 0.2
    assert sum(corrected) / len(corrected) == pytest.approx(plain, abs=0.01)


# Sibling 0 is erased once at segment 0; sibling 1 twice at segment 1, and then forced. Tokens come in twos.
GROUP = roll(levels({("p", 0, 0, 0): 2.0, **{("p", 1, 1, e): 3.0 for e in range(3)}}))[0]["p"]


def _config(cap: float, spared: float = 0.0) -> Config:
    erasure = replace(MEAN_ONLY, commit_anyway=spared)
    return Config(rollout=RolloutConfig(), erasure=erasure, train=TrainConfig(selection_cap=cap))


def test_segments_are_weighed_by_what_the_group_drew_at_their_index() -> None:
    """At segment 0 two of three candidates passed, at 1 one of four, at 2 all."""
    at_first, at_second = 2 / 3, 1 / 4
    up_first, up_second = ((1 - (1 - a) ** 3) / a for a in (at_first, at_second))
    forced = (1 - at_second) ** 2
    sequences = [trajectory_sequence(t, 0) for t in GROUP.trajectories]
    first, second = with_selection(sequences, GROUP, _config(9.0))
    assert first.selection_T is not None
    assert second.selection_T is not None
    assert first.selection_T.tolist() == pytest.approx([1 / up_first] * 2 + [1 / up_second] * 2 + [1.0] * 2)
    assert second.selection_T.tolist() == pytest.approx([1 / up_first] * 2 + [1 / forced] * 2 + [1.0] * 2)
    capped = with_selection(sequences, GROUP, _config(1.5))[1].selection_T
    assert capped is not None
    assert capped.tolist()[2:4] == [1.5, 1.5]
    assert [s.judgement and s.judgement.verdict for s in GROUP.trajectories[1].segments][1] is Verdict.FORCED


def test_what_was_not_selected_is_not_weighed() -> None:
    plain = roll(levels({}), config=RolloutConfig(erase=False, num_generations=2, segment_length=2, max_segments=2))[0][
        "p"
    ]
    sequence = trajectory_sequence(plain.trajectories[0], 0)
    assert with_selection([sequence], plain, _config(0.0)) == [sequence]
    ones = with_selection([sequence], plain, _config(9.0))[0].selection_T
    assert ones is not None
    assert ones.tolist() == [1.0] * 4
    (erased,) = erased_sequences(GROUP.trajectories[0], 0)
    assert with_selection([erased], GROUP, _config(9.0))[0] is erased


def test_weights_multiply_those_of_the_engine() -> None:
    [sequence] = with_selection([trajectory_sequence(GROUP.trajectories[1], 0)], GROUP, _config(9.0))
    assert sequence.selection_T is not None
    logprobs_T = sequence.rollout_logprobs_T + 0.1
    lesson = Lesson(sequence, Scores(logprobs_T, logprobs_T, None), None, torch.ones(6), 2)
    alone = weighed(lesson, TrainConfig()).importance
    both = weighed(lesson, TrainConfig(importance_correction="token_truncate")).importance
    assert alone is not None
    assert both is not None
    assert alone.weights_T.tolist() == pytest.approx(sequence.selection_T.tolist())
    assert both.weights_T.tolist() == pytest.approx((sequence.selection_T * 1.10517).tolist(), rel=1e-4)
    assert not alone.limited_T.any()
    assert weighed(replace(lesson, sequence=replace(sequence, selection_T=None)), TrainConfig()).importance is None


def test_another_attempt_than_the_last_is_not_what_the_weights_are_for() -> None:
    with pytest.raises(UserError, match=r"selection_cap.*on_exhausted = 'last'"):
        build_config({"train": {"selection_cap": 4.0}, "erasure": {"on_exhausted": "least_uncertain"}})
    assert ErasureConfig().commit_anyway == 0
