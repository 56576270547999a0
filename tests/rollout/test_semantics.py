"""How rollouts behave: one test a sentence of docs/rollout.md, whose words are the test's first line."""

from __future__ import annotations

import inspect
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from e3rl.config import ErasureConfig, RolloutConfig
from e3rl.errors import UserError
from e3rl.rollout.distribution import Distribution
from e3rl.rollout.moments import Moments
from e3rl.rollout.reference import ReferenceStatistics, measured_by
from e3rl.rollout.scheduler import Committed, Erased, Finished, Scheduler, summarise
from e3rl.testing.scripted import EOS, Scripted, ScriptedEngine
from e3rl.types import Draw, Trajectory, Verdict
from tests.rollout.slow_reference import check_numbers
from tests.rollout.worlds import MEAN_ONLY, PLAIN_GROUP, levels, prompt, roll, rollout

ALONE = rollout(num_generations=1)
LEAST = replace(MEAN_ONLY, on_exhausted="least_uncertain")
EXTREMUM = replace(MEAN_ONLY, base_weight=0.0, extremum_weight=1.0, max_erasures=1)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def only(groups: dict, sibling: int = 0) -> Trajectory:
    (group,) = groups.values()
    return group.trajectories[sibling]


def verdicts(trajectory: Trajectory) -> list[tuple[int, Verdict]]:
    """(attempt, verdict) of each committed segment."""
    return [(s.judgement.attempt, s.judgement.verdict) for s in trajectory.segments]


def ticks_of(engine: ScriptedEngine, kind: str, sibling: int, segment: int, attempt: int = 0, prompt: str = "p") -> int:
    """When a call was made for the candidate."""
    draw = Draw(7, 3, prompt, sibling, segment, attempt)
    (call,) = [c for c in engine.made(kind) if c.draw == draw]
    return call.tick


def reference_of(config: RolloutConfig, erasure: ErasureConfig, *segments: Distribution) -> ReferenceStatistics:
    return ReferenceStatistics(measured_by(config, erasure), segments, Moments.of([0.0, 2.0]))


# Segments


def test_lengths():
    """1. A candidate asks for L tokens or what is left below the completion limit, so a last segment may be shorter."""
    groups, engine = roll(levels({}), config=rollout(segment_length=4, max_segments=3, max_completion_length=10))
    assert only(groups).segment_lengths == (4, 4, 2)
    assert [c.tokens for c in engine.made("extend") if c.draw.sibling == 1] == [4, 4, 2]


def test_finish():
    """2. A response ends with 'stop' when a candidate that ends in EOS is committed, and with 'length' at the limit."""
    groups, _ = roll(levels({}, ends=[("p", 0, 1, 0)]))
    first, second = only(groups, 0), only(groups, 1)
    assert (first.finish, first.segment_lengths, first.ids[-1]) == ("stop", (2, 2), EOS)
    assert (second.finish, second.segment_lengths) == ("length", (2, 2, 2))


def test_end_of_sequence_at_the_limit_is_a_stop():
    groups, _ = roll(levels({}, ends=[("p", 0, 2, 0)]))
    assert (only(groups).finish, only(groups).committed_tokens) == ("stop", 6)


def test_erased_ending():
    """3. A candidate that ends in EOS is judged like any other: erased, it does not end the response."""
    groups, _ = roll(levels({("p", 0, 0, 0): 2.0}, ends=[("p", 0, 0, 0)]))
    trajectory = only(groups)
    assert trajectory.erasures[0].candidate.ended
    assert (trajectory.finish, EOS in trajectory.ids, trajectory.committed_tokens) == ("length", False, 6)


# Erasure


def test_commit():
    """4. U <= Theta, equality included, commits the candidate, and the next segment starts at attempt 0."""
    groups, _ = roll(levels({("p", 0, 0, 0): 1.0, ("p", 0, 1, 0): 0.999}))
    assert verdicts(only(groups)) == [(0, Verdict.COMMIT)] * 3
    assert only(groups).segments[0].judgement.uncertainty.total == only(groups).segments[0].judgement.threshold.total


def test_erase():
    """5. U > Theta with budget left erases the candidate and draws again on the same prefix, one attempt higher."""
    groups, engine = roll(levels({("p", 0, 1, 0): 1.001}))
    trajectory = only(groups)
    (erasure,) = trajectory.erasures
    assert (erasure.index, erasure.start, erasure.judgement.attempt) == (1, 2, 0)
    assert erasure.judgement.verdict is Verdict.ERASE
    assert verdicts(trajectory) == [(0, Verdict.COMMIT), (1, Verdict.COMMIT), (0, Verdict.COMMIT)]
    assert [c.tokens for c in engine.made("rollback")] == [2]
    assert trajectory.segments[1].candidate.ids != erasure.candidate.ids


def test_forced_accept():
    """6. U > Theta with the budget spent commits the last candidate as forced; the next segment starts at attempt 0."""
    groups, _ = roll(levels({("p", 0, 0, e): 1.5 + e for e in range(3)}))
    trajectory = only(groups)
    assert verdicts(trajectory) == [(2, Verdict.FORCED), (0, Verdict.COMMIT), (0, Verdict.COMMIT)]
    assert trajectory.segments[0].judgement.uncertainty.total == 3.5
    assert [e.judgement.attempt for e in trajectory.erasures] == [0, 1]


def test_least_uncertain():
    """7. Under on_exhausted = 'least_uncertain' the attempt of smallest U is drawn again and committed as forced."""
    table = {("p", 0, 0, 0): 1.5, ("p", 0, 0, 1): 1.2, ("p", 0, 0, 2): 1.8}
    erased_ids = {}
    groups, engine = roll(
        levels(table),
        replace(LEAST, eta=0.01),
        ALONE,
        observe=lambda e: (
            isinstance(e, Erased) and erased_ids.update({e.erasure.judgement.attempt: e.erasure.candidate.ids})
        ),
    )
    segment = only(groups).segments[0]
    assert segment.judgement.verdict is Verdict.FORCED
    assert segment.judgement.attempt == 1
    assert segment.judgement.uncertainty.total == pytest.approx(1.2)
    assert segment.judgement.threshold.total == pytest.approx(math.exp(0.01))
    assert segment.candidate.ids == erased_ids[1]
    assert [c.draw.attempt for c in engine.made("extend") if c.draw.segment == 0] == [0, 1, 2, 1]
    assert verdicts(only(groups))[1] == (0, Verdict.COMMIT)


def test_redraw_on_record():
    """8. A redraw takes its candidate off the erased ones and puts the last attempt there; its tokens count apart."""
    table = {("p", 0, 0, 0): 1.2, ("p", 0, 0, 1): 1.5, ("p", 0, 0, 2): 1.8}
    groups, engine = roll(levels(table), LEAST, ALONE)
    stats = summarise(groups.values())
    assert [e.judgement.attempt for e in only(groups).erasures] == [1, 2]
    assert {e.judgement.verdict for e in only(groups).erasures} == {Verdict.ERASE}
    assert (stats.committed_tokens, stats.erased_tokens, stats.redrawn_tokens) == (6, 4, 2)
    assert sum(c.tokens for c in engine.made("deliver")) == 12
    assert stats.r == pytest.approx(1.0)


def test_least_uncertain_is_the_last():
    """9. If the last attempt is itself the least uncertain, it is committed and nothing is drawn again."""
    table = {("p", 0, 0, 0): 1.8, ("p", 0, 0, 1): 1.5, ("p", 0, 0, 2): 1.2}
    groups, engine = roll(levels(table), LEAST, ALONE)
    assert verdicts(only(groups))[0] == (2, Verdict.FORCED)
    assert [c.draw.attempt for c in engine.made("extend") if c.draw.segment == 0] == [0, 1, 2]
    assert summarise(groups.values()).redrawn_tokens == 0


def test_redraw_that_differs_stays_truthful():
    """An engine that is not exact: what it delivered is committed, and what was erased stays on record."""
    asked: list[Draw] = []

    def script(draw: Draw, tokens: int) -> Scripted:
        asked.append(draw)
        if draw.segment == 0 and asked.count(draw) == 2:
            return Scripted((1.3,), ended=True)
        return levels({("p", 0, 0, e): 1.2 + e for e in range(3)})(draw, tokens)

    groups, engine = roll(script, LEAST, ALONE)
    stats = summarise(groups.values())
    assert only(groups).segments[0].judgement.uncertainty.total == pytest.approx(1.3)
    assert [e.judgement.attempt for e in only(groups).erasures] == [0, 1, 2]
    assert stats.committed_tokens + stats.erased_tokens == sum(c.tokens for c in engine.made("deliver")) == 7
    assert stats.redrawn_tokens == 0


@pytest.mark.parametrize("erasure", [MEAN_ONLY, LEAST], ids=["last", "least_uncertain"])
def test_no_budget(erasure):
    """10. With a budget of 0 nothing is erased: what lies above its threshold is forced."""
    groups, engine = roll(levels({("p", 0, 1, 0): 2.0}), replace(erasure, max_erasures=0))
    assert verdicts(only(groups)) == [(0, Verdict.COMMIT), (0, Verdict.FORCED), (0, Verdict.COMMIT)]
    assert engine.made("rollback") == []


def test_budget_is_per_segment():
    """11. The budget counts per segment, not per response."""
    table = {("p", 0, n, e): 2.0 for n in range(3) for e in range(2)}
    groups, _ = roll(levels(table))
    assert verdicts(only(groups)) == [(2, Verdict.COMMIT)] * 3
    assert len(only(groups).erasures) == 6


def test_draws():
    """12. Every candidate has a draw of its own: seed, step, prompt, sibling, segment and attempt name it."""
    _, engine = roll(levels({("p", 0, 1, 0): 2.0, ("q", 1, 0, 0): 2.0}), prompts=["p", "q"])
    draws = [c.draw for c in engine.made("extend")]
    assert len(set(draws)) == len(draws) == 14
    assert Draw(seed=7, step=3, prompt_id="p", sibling=0, segment=1, attempt=1) in draws
    assert Draw(seed=7, step=3, prompt_id="q", sibling=1, segment=0, attempt=1) in draws


# Uncertainty


def test_smoothing():
    """13. Smoothing looks back over the sibling's own committed segments: not ahead, not at what was erased (D2)."""
    table = {("p", 0, 0, 0): 9.0, ("p", 0, 0, 1): 0.4, ("p", 0, 1, 0): 0.8, ("p", 0, 2, 0): 0.1, ("p", 1, 0, 0): 0.9}
    groups, _ = roll(levels(table), replace(MEAN_ONLY, smoothing_window=1, smoothing_decay=0.5))
    smoothed = [s.judgement.uncertainty.smoothed for s in only(groups).segments]
    assert smoothed == pytest.approx([0.4, (0.8 + 0.2) / 1.5, (0.1 + 0.4) / 1.5])


def test_reference_entropies():
    """14. Reference entropies are those of first candidates up to n and of retries committed before n (D3)."""
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
    """16. The terms of U are recorded weighted and add up to it, and a weight of 0 takes its term out (D14)."""
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
    """17. Group statistics are over first candidates only: a retry never moves the threshold that judges it (D4)."""
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
    """19. With fewer than min_siblings at a segment the group's last baseline stays in force (D5)."""
    table = {("p", 0, 0, 0): 0.3, ("p", 1, 0, 0): 0.6, ("p", 1, 1, 0): 0.1}
    groups, _ = roll(levels(table, ends=[("p", 0, 0, 0)]), PLAIN_GROUP)
    assert [s.judgement.threshold.baseline for s in only(groups, 1).segments] == pytest.approx([0.6] * 3)


def test_modulation():
    """20. phi is first_modulation at the first segment (D6), then follows the sibling's own history (eq 18)."""
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
    """A quantile baseline keeps its share of the first candidates, whatever the largest is; it is frozen as well (D4)."""
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
    """23. A single sample is judged by reference statistics (spread or quantile), beyond their last index by the last known."""
    config = replace(PLAIN_GROUP, extremum_weight=1.0)
    reference = reference_of(ALONE, config, Distribution.of([1.0, 3.0]), Distribution.of([4.0, 8.0]))
    groups, _ = roll(levels({}), config, ALONE, reference=reference)
    judgements = [s.judgement for s in only(groups).segments]
    assert [j.threshold.baseline for j in judgements] == pytest.approx([2 + 1, 6 + 2, 6 + 2])
    assert judgements[0].uncertainty.extremum == pytest.approx(sigmoid((0.5 - 1) / (1 + 1e-6)))
    calmest = replace(config, baseline="quantile", quantile=0.25)
    groups, _ = roll(levels({}), calmest, ALONE, reference=reference)
    assert [s.judgement.threshold.baseline for s in only(groups).segments] == pytest.approx([1.5, 5.0, 5.0])


def test_missing_reference():
    """24. Needed reference statistics that are missing or were measured otherwise are an error before any token."""
    engine = ScriptedEngine(levels({}))
    with pytest.raises(UserError, match=r"fewer than erasure.min_siblings = 2.*e3rl calibrate"):
        Scheduler(engine, ALONE, PLAIN_GROUP, seed=0)
    with pytest.raises(UserError, match=r"erasure.baseline = 'reference'.*e3rl calibrate"):
        Scheduler(engine, rollout(), replace(PLAIN_GROUP, baseline="reference"), seed=0)
    with pytest.raises(UserError, match="e3rl calibrate"):
        Scheduler(engine, ALONE, PLAIN_GROUP, seed=0, reference=reference_of(ALONE, PLAIN_GROUP))
    measured = reference_of(replace(ALONE, segment_length=9), PLAIN_GROUP, Distribution.of([1.0]))
    with pytest.raises(UserError, match=r"rollout.segment_length: 9 then, 2 now"):
        Scheduler(engine, ALONE, PLAIN_GROUP, seed=0, reference=measured)
    calmest = replace(PLAIN_GROUP, baseline="quantile")
    unmarked = reference_of(ALONE, calmest, Distribution(Moments.of([1.0])))
    with pytest.raises(UserError, match=r"hold no quantiles of U.*e3rl calibrate"):
        Scheduler(engine, ALONE, calmest, seed=0, reference=unmarked)
    Scheduler(engine, replace(ALONE, erase=False), PLAIN_GROUP, seed=0)
    assert engine.calls == []


# Scheduling


def slow(prompt_id: str, sibling: int, extra: int):
    """Every candidate of one sibling takes longer."""
    return lambda draw, tokens: tokens + extra * ((draw.prompt_id, draw.sibling) == (prompt_id, sibling))


def test_barrier():
    """25. A first candidate is judged when every sibling has finished or delivered its own, and not before."""
    seen: list[tuple[int, int]] = []
    engine_settings = {"ticks": slow("p", 1, 5)}
    _, engine = roll(
        levels({}), engine=engine_settings, observe=lambda e: isinstance(e, Committed) and seen.append((e.sibling, 0))
    )
    assert ticks_of(engine, "deliver", 0, 0) == 2
    assert ticks_of(engine, "deliver", 1, 0) == 7
    assert ticks_of(engine, "extend", 0, 1) == 7
    assert ticks_of(engine, "extend", 0, 2) == 14
    assert len(seen) == 6


def test_accepted_sibling_goes_on():
    """26. An accepted sibling goes on while another regenerates, and waits for it only at the next barrier."""
    _, engine = roll(levels({("p", 1, 0, 0): 2.0, ("p", 1, 0, 1): 2.0}))
    assert [ticks_of(engine, "extend", 1, 0, e) for e in range(3)] == [0, 2, 4]
    assert ticks_of(engine, "extend", 0, 1) == 2
    assert ticks_of(engine, "deliver", 0, 1) == 4
    assert ticks_of(engine, "deliver", 1, 1) == 8
    assert ticks_of(engine, "extend", 0, 2) == ticks_of(engine, "extend", 1, 2) == 8
    assert engine.clock == 10


def test_finishing_opens_barriers():
    """27. A sibling that finishes opens the barriers that waited for it."""
    table = {("p", 1, 0, 0): 2.0, ("p", 1, 0, 1): 2.0}
    _, engine = roll(levels(table, ends=[("p", 1, 0, 2)]))
    assert ticks_of(engine, "deliver", 0, 1) == 4
    assert ticks_of(engine, "deliver", 1, 0, 2) == 6
    assert ticks_of(engine, "extend", 0, 2) == 6


@pytest.mark.parametrize("source", ["reference", "static"])
def test_no_barrier(source):
    """28. Where no statistic comes from the siblings there is no barrier."""
    config = replace(MEAN_ONLY, baseline=source, entropy_reference="batch")
    outside = {
        "reference": reference_of(rollout(), config, Distribution.of([1.0])),
        "entropy_moments": Moments.of([0.5, 1.0]),
    }
    _, engine = roll(levels({}), config, engine={"ticks": slow("p", 1, 50)}, **outside)
    assert [ticks_of(engine, "extend", 0, n) for n in range(3)] == [0, 2, 4]
    assert ticks_of(engine, "deliver", 1, 0) == 52


def test_other_groups_fill_the_batch():
    """29. Other groups fill the batch while a group waits."""
    table = {("p", 1, 0, 0): 2.0, ("p", 1, 0, 1): 2.0}
    _, engine = roll(levels(table), prompts=["p", "q"], engine={"max_rows": 2, "cache_rows": 4})
    tokens = sum(c.tokens for c in engine.made("deliver"))
    assert tokens == 28
    assert engine.batch_sizes == [2] * 14


def test_rows_are_reused():
    """30. A finished row is released at once, and a new group is admitted as soon as all of its rows fit."""
    ends = [("p", 0, 0, 0), ("q", 1, 1, 0)]
    _, engine = roll(levels({}, ends=ends), prompts=["p", "q", "r"], engine={"cache_rows": 5})
    released = {c.row: c.tick for c in engine.made("release")}
    admitted = [c.tick for c in engine.made("prefill")]
    assert (released[0], released[3]) == (2, 4)
    assert admitted == [0, 0, 0, 0, 2, 2]  # a fifth row was free; r needs two
    assert max(c.row for c in engine.made("prefill")) == 5


def test_group_too_large():
    """31. A group that can never fit is an error that names both numbers."""
    with pytest.raises(UserError, match=r"needs 4 rows .*the engine has 3"):
        roll(levels({}), config=rollout(num_generations=4), engine={"cache_rows": 3})
    groups, engine = roll(levels({}), config=rollout(num_generations=4), prompts=[], engine={"cache_rows": 3})
    assert (groups, engine.calls) == ({}, [])


def test_same_problem_twice():
    """32. A problem that occurs twice in a batch is an error, since both groups would get the same draws."""
    with pytest.raises(UserError, match=r"problem id 'p' occurs twice"):
        roll(levels({}), prompts=["p", "q", "p"])


def test_plain():
    """33. A plain rollout judges nothing, erases nothing and waits for nothing."""
    groups, engine = roll(
        levels({}, ends=[("p", 0, 1, 0)], default=99.0),
        PLAIN_GROUP,
        replace(rollout(), erase=False),
        engine={"ticks": slow("p", 1, 50)},
    )
    trajectory = only(groups)
    assert [s.judgement for s in trajectory.segments] == [None, None]
    assert (trajectory.erasures, trajectory.finish) == ((), "stop")
    assert ticks_of(engine, "extend", 0, 1) == 2
    assert engine.made("rollback") == []
    assert groups["p"].policy_version == 5


def test_independence():
    """34. What a group becomes does not depend on batching, on the order of completion or on other groups."""
    script = levels({("p", 1, 0, 0): 2.0, ("q", 0, 1, 0): 0.9, ("p", 0, 2, 0): 0.8}, ends=[("q", 1, 1, 0)])
    together, _ = roll(script, PLAIN_GROUP, prompts=["p", "q", "r"])
    narrow, _ = roll(script, PLAIN_GROUP, prompts=["r", "q", "p"], engine={"max_rows": 1, "cache_rows": 2})
    alone, _ = roll(script, PLAIN_GROUP, prompts=["p"], engine={"ticks": slow("p", 0, 3)})
    assert together == narrow
    assert alone["p"] == together["p"]


class Failing(ScriptedEngine):
    """Breaks down at a given poll."""

    polls = 0

    def poll(self):
        self.polls += 1
        if self.polls == 3:
            raise OSError("the machine is gone")
        return super().poll()


def test_rows_are_released():
    """35. Every row is released when the rollout ends, is closed early, or is stopped by an error."""
    script, prompts = levels({}, ends=[("p", 0, 0, 0), ("p", 1, 0, 0)]), [prompt(p) for p in "pqr"]
    whole, closed, broken = ScriptedEngine(script), ScriptedEngine(script), Failing(script)
    list(Scheduler(whole, rollout(), MEAN_ONLY, seed=0).run(prompts, 0, 0))
    groups = Scheduler(closed, rollout(), MEAN_ONLY, seed=0).run(prompts, 0, 0)
    assert next(groups).prompt.problem.id == "p"
    assert closed.held == 4
    groups.close()
    with pytest.raises(OSError, match="the machine is gone"):
        list(Scheduler(broken, rollout(), MEAN_ONLY, seed=0).run(prompts, 0, 0))
    assert (whole.held, closed.held, broken.held) == (0, 0, 0)


def test_events():
    """36. What happens is told as it happens: each commit, each erasure, each finished group."""
    events: list[Committed | Erased | Finished] = []
    groups, _ = roll(levels({("p", 0, 1, 0): 2.0}), observe=events.append)
    told = [type(e).__name__ for e in events if isinstance(e, Finished) or e.sibling == 0]
    assert told == ["Committed", "Erased", "Committed", "Committed", "Finished"]
    assert [e.erasure for e in events if isinstance(e, Erased)] == list(only(groups).erasures)
    assert events[-1] == Finished(groups["p"])
    assert {e.prompt_id for e in events[:-1]} == {"p"}


def test_complete_record():
    """37. The record is complete: U, its terms, Theta and its factors can all be recomputed from it."""
    config = ErasureConfig(
        perturbation_weight=0.7, length_exponent=0.5, kappa0=0.2, kappa1=0.3, eta=0.02, first_modulation=0.9
    )
    table = {
        ("p", i, n, e): (0.3 * i + 0.2 * n, 0.9 - 0.4 * e * n) for i in range(4) for n in range(3) for e in range(6)
    }
    groups, _ = roll(levels(table, ends=[("p", 2, 1, 0)]), config, rollout(num_generations=4))
    erased = sum(len(t.erasures) for t in groups["p"].trajectories)
    assert erased > 0
    assert check_numbers(groups["p"], config) == erased + 11


def test_every_sentence_is_pinned():
    """docs/rollout.md and this file say the same sentences."""
    documented = re.findall(
        r"^(\d+\. .*)$", (Path(__file__).parents[2] / "docs/rollout.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    tests = [f for name, f in inspect.getmembers(sys.modules[__name__], inspect.isfunction) if name.startswith("test_")]
    firsts = [(f.__doc__ or "").splitlines()[:1] for f in tests]
    pinned = [line[0] for line in firsts if line and line[0][0].isdigit()]
    assert sorted(pinned, key=lambda s: int(s.split(".")[0])) == documented
    assert [int(s.split(".")[0]) for s in documented] == list(range(1, len(documented) + 1))
