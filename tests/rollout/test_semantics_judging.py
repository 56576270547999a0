"""Sentences of docs/rollout.md about uncertainty and thresholds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from e3rl.config import ErasureConfig, RolloutConfig
from e3rl.errors import UserError
from e3rl.rollout import judge
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.moments import Distribution, Moments
from e3rl.rollout.statistics import CalibrationStatistics
from e3rl.rollout.stats import summarise
from e3rl.testing.scripted import Scripted, ScriptedEngine
from e3rl.types import Verdict
from tests.rollout.worlds import ALONE, MEAN_ONLY, PLAIN_GROUP, calibration_of, levels, only, roll, rollout, verdicts

EXTREMUM = replace(MEAN_ONLY, base_weight=0.0, extremum_weight=1.0, max_erasures=1)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_smoothing():
    """13. Smoothing looks back over the sibling's own committed segments: not ahead, not at what was erased."""
    table = {("p", 0, 0, 0): 9.0, ("p", 0, 0, 1): 0.4, ("p", 0, 1, 0): 0.8, ("p", 0, 2, 0): 0.1, ("p", 1, 0, 0): 0.9}
    groups, _ = roll(levels(table), replace(MEAN_ONLY, smoothing_window=1, smoothing_decay=0.5))
    smoothed = [s.judgement.uncertainty.smoothed for s in only(groups).segments]
    assert smoothed == pytest.approx([0.4, (0.8 + 0.2) / 1.5, (0.1 + 0.4) / 1.5])


def test_reference_entropies():
    """14. Reference entropies are those of first candidates up to n and of retries committed before n."""
    table = {
        ("p", 0, 0, 0): (1.0, 3.0),  # above the mean of 2, so erased; its tokens stay in the reference
        ("p", 0, 0, 1): (1.0, 1.0),  # committed retry: counts from segment 1 on
        ("p", 1, 0, 0): (2.0, 2.0),
        ("p", 0, 1, 0): (1.0, 1.0),
        ("p", 1, 1, 0): (1.0, 1.0),
    }
    config = replace(EXTREMUM, static_baseline=0.6)
    groups, _ = roll(levels(table), config, rollout(max_segments=2))
    (erasure,) = only(groups).erasures
    assert erasure.judgement.uncertainty.extremum == pytest.approx(sigmoid(1 / (math.sqrt(0.5) + 1e-6)))
    assert only(groups).segments[0].judgement.uncertainty.extremum == pytest.approx(
        sigmoid(-1 / (math.sqrt(0.5) + 1e-6))
    )
    mean, std = 1.4, math.sqrt((1.6**2 + 2 * 0.6**2 + 7 * 0.4**2) / 10)  # of 3, 2, 2 and seven times 1
    for sibling in (0, 1):
        extremum = only(groups, sibling).segments[1].judgement.uncertainty.extremum
        assert extremum == pytest.approx(sigmoid((1.0 - mean) / (std + 1e-6)))


def test_batch_entropies():
    """15. With entropy_reference = 'batch' they are the previous batch's; the first batch falls back on the group's."""
    config = replace(EXTREMUM, entropy_reference="batch")
    script = levels({("p", 0, 0, 0): (1.0, 3.0)})
    later, _ = roll(script, config, ALONE, entropy_moments=Moments.of([0.0, 2.0]))
    first, _ = roll(script, config, ALONE)
    assert only(later).segments[0].judgement.uncertainty.extremum == pytest.approx(sigmoid(2 / (1 + 1e-6)))
    assert only(first).segments[0].judgement.uncertainty.extremum == pytest.approx(sigmoid(1 / (1 + 1e-6)))
    whole, _ = roll(script, replace(config, entropy_reference="group"), ALONE, entropy_moments=Moments.of([0.0, 2.0]))
    assert only(whole) == only(first), "what other prompts did is not looked at"


@pytest.mark.parametrize(
    ("weight", "term", "value"),
    [
        ("base_weight", "base", 2 * 0.3),
        ("gradient_weight", "gradient", 3 * 0.2),
        ("extremum_weight", "extremum", 5 * sigmoid(0.1 / (0.1 + 1e-6))),
        ("perturbation_weight", "perturbation", 7 * 0.25),
    ],
)
def test_weights(weight, term, value):
    """16. The terms of U are recorded weighted and add up to it, and a weight of 0 takes its term out."""
    weights = {"base_weight": 2.0, "gradient_weight": 3.0, "extremum_weight": 5.0, "perturbation_weight": 7.0}
    config = replace(MEAN_ONLY, static_baseline=99.0, **weights)

    def measured(erasure: ErasureConfig):
        groups, _ = roll(lambda draw, tokens: Scripted((0.2, 0.4), (0.5, 0.0)), erasure, ALONE)
        return only(groups).segments[0].judgement.uncertainty

    terms = ("base", "gradient", "extremum", "perturbation")
    full, without = measured(config), measured(replace(config, **{weight: 0.0}))
    assert getattr(full, term) == pytest.approx(value)
    assert full.total == pytest.approx(sum(getattr(full, t) for t in terms), abs=1e-12)
    assert {t: getattr(without, t) for t in terms} == {t: getattr(full, t) for t in terms} | {term: 0.0}
    assert without.total == pytest.approx(full.total - value)


# Threshold


def test_frozen_threshold():
    """17. Group statistics are over first candidates only: a retry never moves the threshold that judges it."""
    table = {("p", 2, 0, 0): 2.0, ("p", 2, 0, 1): 9.0, ("p", 2, 0, 2): 1.0}
    groups, _ = roll(levels(table), PLAIN_GROUP, rollout(num_generations=3))
    trajectory = only(groups, 2)
    judged = [*trajectory.erasures, trajectory.segments[0]]
    assert [j.judgement.attempt for j in judged] == [0, 1, 2]
    assert [j.judgement.threshold.baseline for j in judged] == pytest.approx([1 + math.sqrt(0.5)] * 3)


def test_siblings_that_are_alike_are_not_erased():
    """Rounding in the group's mean erases nobody, whatever the number of siblings."""
    groups, _ = roll(levels({}, default=0.1 + 0.2), PLAIN_GROUP, rollout(num_generations=7))
    pair, _ = roll(levels({("p", 0, 0, 0): 0.1, ("p", 1, 0, 0): 0.7}), PLAIN_GROUP, rollout(num_generations=2))
    assert summarise(groups.values()).erasures == summarise(pair.values()).erasures == 0


def test_finished_siblings_do_not_count():
    """18. A sibling that has finished no longer counts in the statistics of later segments."""
    table = {("p", 1, 1, 0): 0.4, ("p", 2, 1, 0): 0.8}
    groups, _ = roll(levels(table, ends=[("p", 0, 0, 0)]), PLAIN_GROUP, rollout(num_generations=3))
    assert only(groups, 1).segments[1].judgement.threshold.baseline == pytest.approx(0.6 + 0.2)


def test_too_few_siblings():
    """19. With fewer than min_siblings at a segment the group's last baseline stays in force."""
    table = {("p", 0, 0, 0): 0.3, ("p", 1, 0, 0): 0.6, ("p", 1, 1, 0): 0.1}
    groups, _ = roll(levels(table, ends=[("p", 0, 0, 0)]), PLAIN_GROUP)
    assert [s.judgement.threshold.baseline for s in only(groups, 1).segments] == pytest.approx([0.6] * 3)


def test_modulation():
    """20. phi is first_modulation at the first segment, then follows the sibling's own history (eq 18)."""
    config = replace(MEAN_ONLY, static_baseline=2.0, rho=0.5, first_modulation=0.75)
    groups, _ = roll(levels({("p", 0, 0, 0): 1.0, ("p", 0, 1, 0): 1.5, ("p", 1, 0, 0): 0.1}), config)
    phi = [s.judgement.threshold.modulation for s in only(groups).segments]
    distances = [-1.0 / (2 + 1e-6), -0.5 / (2 + 1e-6)]
    assert phi == pytest.approx(
        [0.75, 1 + 0.5 * math.tanh(distances[0]), 1 + 0.5 * math.tanh(sum(distances) / 2)], abs=1e-12
    )
    assert only(groups).segments[1].judgement.threshold.total == pytest.approx(2 * phi[1])


def test_penalty():
    """21. Every erasure raises the threshold of the next attempt by the penalty of eq 17."""
    config = replace(MEAN_ONLY, eta=0.1, delta=1.5)
    groups, _ = roll(levels({("p", 0, 0, e): 1.2 for e in range(3)}), config, ALONE)
    trajectory = only(groups)
    penalties = [r.judgement.threshold.penalty for r in (*trajectory.erasures, trajectory.segments[0])]
    assert penalties == pytest.approx([1.0, math.exp(0.1), math.exp(0.1 * 2**1.5)])
    assert verdicts(trajectory)[0] == (2, Verdict.COMMIT)


def test_quantile_baseline():
    """A quantile baseline keeps its share of the first candidates, whatever the largest is; it is frozen as well."""
    table = {("p", i, 0, 0): u for i, u in enumerate([0.1, 0.2, 0.3, 50.0])} | {("p", 3, 0, 1): 0.1}
    config = replace(PLAIN_GROUP, baseline="quantile", quantile=0.5)
    groups, _ = roll(levels(table), config, rollout(num_generations=4))
    first = [t.segments[0].judgement for t in groups["p"].trajectories]
    assert [j.threshold.baseline for j in first] == pytest.approx([0.25] * 4)
    assert [bool(t.erasures) for t in groups["p"].trajectories] == [False, False, True, True]


def test_static_baseline():
    """22. A static baseline is the same at every segment, whatever the siblings do."""
    table = {("p", 1, n, 0): 0.1 * n for n in range(3)}
    groups, _ = roll(levels(table), replace(MEAN_ONLY, static_baseline=1.7))
    assert {s.judgement.threshold.baseline for t in groups["p"].trajectories for s in t.segments} == {1.7}


def test_single_sample():
    """23. A single sample is judged by calibration statistics (spread or quantile), beyond their last index by the last known."""
    config = replace(PLAIN_GROUP, extremum_weight=1.0)
    calibration = calibration_of(ALONE, config, Distribution.of([1.0, 3.0]), Distribution.of([4.0, 8.0]))
    groups, _ = roll(levels({}), config, ALONE, calibration=calibration)
    judgements = [s.judgement for s in only(groups).segments]
    assert [j.threshold.baseline for j in judgements] == pytest.approx([2 + 1, 6 + 2, 6 + 2])
    assert judgements[0].uncertainty.extremum == pytest.approx(sigmoid((0.5 - 1) / (1 + 1e-6)))
    calmest = replace(config, baseline="quantile", quantile=0.25)
    groups, _ = roll(levels({}), calmest, ALONE, calibration=calibration)
    assert [s.judgement.threshold.baseline for s in only(groups).segments] == pytest.approx([1.5, 5.0, 5.0])


@pytest.mark.parametrize(("source", "largest"), [("group", -0.5), ("batch", -1.5)])
def test_entropies_beside_a_reference_baseline(source, largest):
    """With calibration statistics mu_E and sigma_E are theirs (mean 1), unless they are the previous batch's (mean 2)."""
    config = replace(PLAIN_GROUP, extremum_weight=1.0, entropy_reference=source)
    calibration = calibration_of(ALONE, config, Distribution.of([1.0, 3.0]))
    groups, _ = roll(levels({}), config, ALONE, calibration=calibration, entropy_moments=Moments.of([1.0, 3.0]))
    extremum = only(groups).segments[0].judgement.uncertainty.extremum
    assert extremum == pytest.approx(sigmoid(largest / (1 + 1e-6)))


def test_missing_reference():
    """24. Needed calibration statistics that are missing or were measured otherwise are an error before any token."""
    engine = ScriptedEngine(levels({}))

    def begin(config: RolloutConfig, erasure: ErasureConfig, calibration: CalibrationStatistics | None = None) -> None:
        run_groups(engine, [], GroupSettings(config, erasure, seed=0, calibration=calibration))

    with pytest.raises(UserError, match=r"fewer than erasure.min_siblings = 2.*e3rl calibrate"):
        begin(ALONE, PLAIN_GROUP)
    with pytest.raises(UserError, match=r"erasure.baseline = 'reference'.*e3rl calibrate"):
        begin(rollout(), replace(PLAIN_GROUP, baseline="reference"))
    with pytest.raises(UserError, match="e3rl calibrate"):
        begin(ALONE, PLAIN_GROUP, calibration_of(ALONE, PLAIN_GROUP))
    measured = calibration_of(replace(ALONE, segment_length=9), PLAIN_GROUP, Distribution.of([1.0]))
    with pytest.raises(UserError, match=r"rollout.segment_length: 9 then, 2 now"):
        begin(ALONE, PLAIN_GROUP, measured)
    calmest = replace(PLAIN_GROUP, baseline="quantile")
    unmarked = calibration_of(ALONE, calmest, Distribution(Moments.of([1.0])))
    with pytest.raises(UserError, match=r"hold no quantiles of U.*e3rl calibrate"):
        begin(ALONE, calmest, unmarked)
    begin(replace(ALONE, erase=False), PLAIN_GROUP)
    assert engine.calls == []


def test_a_baseline_below_zero_is_held_above_it_with_a_word_in_the_log(caplog: pytest.LogCaptureFixture):
    """Mean 0.5 and spread 0.3 with kappa_0 = -2.5 make B = -0.25: the threshold must still rise with every attempt."""
    judge._say_floored.cache_clear()
    config = replace(PLAIN_GROUP, kappa0=-2.5, eta=0.9, delta=1.0)
    groups, _ = roll(levels({("p", 0, 0, 0): 0.2, ("p", 1, 0, 0): 0.8}), config, rollout(max_segments=1))
    erased = [e.judgement.threshold for e in only(groups).erasures]
    (committed,) = only(groups).segments
    assert [t.baseline for t in erased] == [1e-6, 1e-6]
    assert [t.total for t in [*erased, committed.judgement.threshold]] == pytest.approx(
        [1e-6, 1e-6 * math.exp(0.9), 1e-6 * math.exp(1.8)]
    )
    assert verdicts(only(groups)) == [(2, Verdict.FORCED)]
    (word,) = caplog.messages
    assert "erasure.kappa0 = -2.5 puts the baseline of some segments at or below 0" in word


def test_a_group_without_any_uncertainty_is_not_held(caplog: pytest.LogCaptureFixture):
    """All U are 0, so B is 0: every candidate is accepted, and nothing is said."""
    groups, _ = roll(levels({}, default=0.0), replace(PLAIN_GROUP, kappa0=-2.5))
    assert not only(groups).erasures
    assert [s.judgement.threshold.baseline for s in only(groups).segments] == [0.0] * 3
    assert not caplog.messages
