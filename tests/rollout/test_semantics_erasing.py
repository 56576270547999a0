"""Sentences of docs/rollout.md about segments and erasure."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from e3rl.engine.requests import uniforms
from e3rl.rollout.orders import Erased
from e3rl.rollout.stats import summarise
from e3rl.testing.scripted import EOS, Scripted
from e3rl.types import Draw, Verdict
from tests.rollout.worlds import ALONE, MEAN_ONLY, levels, only, roll, rollout, verdicts

LEAST = replace(MEAN_ONLY, on_exhausted="least_uncertain")


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
    assert trajectory.segments[1].candidate.ids.tolist() != erasure.candidate.ids.tolist()


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
            isinstance(e, Erased) and erased_ids.update({e.erasure.judgement.attempt: e.erasure.candidate.ids.tolist()})
        ),
    )
    segment = only(groups).segments[0]
    assert segment.judgement.verdict is Verdict.FORCED
    assert segment.judgement.attempt == 1
    assert segment.judgement.uncertainty.total == pytest.approx(1.2)
    assert segment.judgement.threshold.total == pytest.approx(math.exp(0.01))
    assert segment.candidate.ids.tolist() == erased_ids[1]
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


def _chance(sibling: int, segment: int, attempt: int) -> float:
    return float(uniforms(Draw(7, 3, "spared/p", sibling, segment, attempt), 1)[0])


def test_spared():
    """52. Above its threshold a candidate is committed as spared with probability commit_anyway, by its draw's name."""
    config, erasure = rollout(num_generations=40), replace(MEAN_ONLY, commit_anyway=0.3)
    groups, _ = roll(levels({}, default=2.0), erasure, config)
    seen = []
    for trajectory in groups["p"].trajectories:
        for segment in trajectory.segments:
            chances = [_chance(trajectory.sibling, segment.index, attempt) for attempt in range(2)]
            attempt = next((n for n, chance in enumerate(chances) if chance < 0.3), 2)
            expected = (attempt, Verdict.FORCED if attempt == 2 else Verdict.SPARED)
            assert (segment.judgement.attempt, segment.judgement.verdict) == expected
            seen.append(expected)
    assert seen.count((0, Verdict.SPARED)) / len(seen) == pytest.approx(0.3, abs=0.1)
    assert {verdict for _, verdict in seen} == {Verdict.FORCED, Verdict.SPARED}


def test_spared_counts():
    """53. A spared segment counts neither as accepted nor as forced, and the next segment starts at attempt 0."""
    groups, engine = roll(levels({("p", 0, 0, 0): 2.0}), replace(MEAN_ONLY, commit_anyway=0.99), ALONE)
    assert _chance(0, 0, 0) < 0.99
    assert verdicts(only(groups)) == [(0, Verdict.SPARED), (0, Verdict.COMMIT), (0, Verdict.COMMIT)]
    stats = summarise(groups.values())
    assert (stats.acceptance_N, stats.forced, stats.erasures) == ((0.0, 1.0, 1.0), 0, 0)
    assert [c.draw.attempt for c in engine.made("extend")] == [0, 0, 0]
