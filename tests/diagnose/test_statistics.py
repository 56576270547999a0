"""AUROC, within-prefix order and intervals: by hand and against counting every pair."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.diagnose.statistics import (
    auroc,
    erasing_yield,
    highest_success,
    mean_by_problem,
    overall_auroc,
    safe_threshold,
    student_quantile,
    within_prefix_auroc,
)

OBSERVED = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12)


@given(OBSERVED)
def test_auroc_is_the_share_of_pairs_in_order(observed):
    scores, wrong = np.array([s for s, _ in observed], dtype=float), np.array([w for _, w in observed])
    pairs = [(a, b) for a, bad in observed if bad for b, also in observed if not also]
    if not pairs:
        assert np.isnan(auroc(scores, wrong))
    else:
        expected = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
        assert auroc(scores, wrong) == pytest.approx(expected)


def test_a_hard_prefix_is_seen_overall_and_means_nothing_within():
    """Two prefixes: on the hard one all scores are high and most draws wrong. Among its siblings the score is blind."""
    scores = np.array([9.0, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0])
    wrong = np.array([True, True, True, False, False, False, False, True])
    prefix = np.array(["hard"] * 4 + ["easy"] * 4)
    problem = prefix
    assert overall_auroc(scores, wrong, problem).value == pytest.approx(0.75)  # (9 + 3/2 + 3/2) / 16
    within = within_prefix_auroc(scores, wrong, prefix, problem)
    assert within.value == 0.5
    assert within.count == 6


def test_within_prefix_counts_pairs_of_one_prefix_only():
    scores = np.array([2.0, 1.0, 5.0, 6.0])
    wrong = np.array([True, False, True, False])
    prefix = np.array(["a", "a", "b", "b"])
    assert within_prefix_auroc(scores, wrong, prefix, prefix).value == 0.5  # one pair in order, one not


def test_every_pair_counts_alike_however_many_a_problem_has():
    """Four pairs of one problem are out of order, one of the other is in order."""
    scores = np.array([1.0, 1.0, 2.0, 2.0, 2.0, 1.0])
    wrong = np.array([True, True, False, False, True, False])
    prefix = np.array(["a"] * 4 + ["b"] * 2)
    assert within_prefix_auroc(scores, wrong, prefix, prefix).value == pytest.approx(1 / 5)


def test_nothing_to_compare_is_unknown():
    alike = np.array([True, True])
    assert overall_auroc(np.array([1.0, 2.0]), alike, np.array(["p", "q"])).value is None
    assert within_prefix_auroc(np.array([1.0, 2.0]), alike, np.array(["a", "a"]), np.array(["p", "p"])).value is None


def test_the_interval_resamples_problems_not_observations():
    """A problem's hundred equal values are one observation of it, so they don't narrow the interval."""
    few = mean_by_problem(np.array([0.0, 1.0, 0.0, 1.0]), np.array([0, 1, 2, 3]))
    many = mean_by_problem(np.repeat([0.0, 1.0, 0.0, 1.0], 100), np.repeat([0, 1, 2, 3], 100))
    assert (few.low, few.high) == (many.low, many.high) == (0.0, 1.0)
    assert many.value == 0.5


def test_the_interval_is_about_the_mean_over_values():
    """Ten problems of nine zeros and ten of a single one: 10 of 100 values are 1, though half the problems' means are."""
    problem = np.concatenate([np.repeat(np.arange(10), 9), np.arange(10, 20)])
    found = mean_by_problem((problem >= 10).astype(float), problem)
    assert found.value == pytest.approx(0.1)
    assert 0.02 < found.low < 0.1 < found.high < 0.35


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        values = rng.normal(0.3, 1.0, 40)
        found = mean_by_problem(values, np.arange(40))
        covered += found.low <= 0.3 <= found.high
    assert 85 <= covered <= 100


@pytest.mark.parametrize(("success", "segments", "judge"), [(0.1, 8, 0.85), (0.3, 3, 0.95), (0.2, 1, 0.7)])
def test_what_erasing_teaches_agrees_with_draws(success: float, segments: int, judge: float):
    """200,000 segments, drawn up to six times each: erasures, and the variance of the chance to end rightly."""
    rng, right = np.random.default_rng(0), success ** (1 / segments)
    good_DT = rng.random((6, 200_000)) < right
    u_DT = rng.standard_normal(good_DT.shape)
    separation = 3.0
    while abs(auroc_of(separation) - judge) > 1e-4:  # by the definition, not by its inverse
        separation += (judge - auroc_of(separation)) * 3
    accepted_DT = u_DT + separation * ~good_DT < separation / 2
    kept = np.where(accepted_DT.any(axis=0), accepted_DT.argmax(axis=0), 5)
    after = float(good_DT[kept, np.arange(kept.size)].mean())
    r = kept.mean()

    def spread(q: float) -> float:
        """Reached with q^n; from there the chance is 0 or q to the power of what is left."""
        return sum(
            q**n * np.var([0] * 10_000 + [q ** (segments - 1 - n)] * round(10_000 * q / (1 - q)))
            for n in range(segments)
        )

    found = erasing_yield(success, segments, judge)
    assert found.r == pytest.approx(r, rel=0.03)
    assert found.ratio == pytest.approx(spread(after) / spread(right) / (1 + r), rel=0.05)


def auroc_of(separation: float) -> float:
    """Chance that a unit normal so much to the right is above another: by a sum over its quantiles."""
    grid = np.linspace(-8, 8, 2001)
    density = np.exp(-(grid**2) / 2)
    below = np.cumsum(density) / density.sum()
    return float((np.exp(-((grid - separation) ** 2) / 2) * below).sum() / density.sum())


def test_above_the_highest_success_erasing_does_not_pay():
    limit = highest_success(8, 0.85)
    assert erasing_yield(limit, 8, 0.85).ratio > 1 > erasing_yield(limit + 0.002, 8, 0.85).ratio
    assert limit == pytest.approx(0.2, abs=0.01)
    assert highest_success(1, 0.95) == 0.0  # all of a response drawn again costs more than it teaches
    assert highest_success(8, 0.5) == 0.0  # a blind judge


def test_student_quantiles() -> None:
    """Tables: 1.6973 at 30 degrees of freedom, 2.7638 at 10, 4.0321 at 5."""
    found = [student_quantile(level, degrees) for level, degrees in ((0.95, 30), (0.99, 10), (0.995, 5))]
    assert found == pytest.approx([1.6973, 2.7638, 4.0321], rel=0.01)


def test_safe_threshold_by_hand() -> None:
    """Four problems of two forks: above 1 a fork gains 0.3 on average, and the other's loss eats that up."""
    scores, problem = np.array([1.0, 2.0] * 4), np.repeat(np.arange(4), 2)
    worth = np.array([-0.3, 0.3, -0.3, 0.32, -0.3, 0.28, -0.3, 0.3])
    assert safe_threshold(scores, worth, problem, [0.0, 1.0]) == 1.0
    assert safe_threshold(scores, -worth, problem, [0.0, 1.0]) is None
    assert safe_threshold(scores, worth, np.zeros(8), [0.0, 1.0]) is None, "one problem has no spread"
    assert safe_threshold(scores, np.abs(worth), problem, [0.0, 1.0]) == 0.0, "of two, where more is gained"


def _world(rng: np.random.Generator, mean_by_quarter: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Forks of 60 problems, eight each: scores, observed worth (a retry right or wrong, the first too), problems."""
    problem = np.repeat(np.arange(60), 8)
    scores, hard = rng.random(480), rng.normal(0, 0.1, 60)[problem]
    gained = mean_by_quarter[(scores * 4).astype(int)] + hard
    first = rng.random(480) < 0.3
    retries = rng.binomial(4, np.clip(0.3 + gained, 0, 1)) / 4
    return scores, retries - first, problem


def test_a_rule_that_is_surely_worth_its_tokens_is_hardly_ever_worse_than_plain_decoding() -> None:
    """Where no retry is worth anything, one is allowed in at most one of twenty worlds; where quarters gain or lose, what is
    allowed is worth something in all but one of twenty; and where the top quarter gains much it is found."""
    rng, edges = np.random.default_rng(0), [-np.inf, 0.25, 0.5, 0.75]
    nothing = [safe_threshold(*_world(rng, np.zeros(4)), edges) for _ in range(300)]
    assert sum(edge is not None for edge in nothing) <= 24  # 15 expected at most, and two standard deviations
    worse = found = 0
    for _ in range(300):
        means = rng.normal(-0.02, 0.1, 4)
        edge = safe_threshold(*_world(rng, means), edges)
        found += edge is not None
        worse += edge is not None and means[max(0, int(4 * edge) if edge > 0 else 0) :].sum() < 0
    assert found > 30
    assert worse <= 15
    steep = [safe_threshold(*_world(rng, np.array([-0.2, -0.1, -0.1, 0.3])), edges) for _ in range(100)]
    assert steep.count(0.75) > 95
