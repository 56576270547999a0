"""The critic: what it is before it learns, what an update finds, and that every bit of it is kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from e3rl.config import ErasureConfig
from e3rl.diagnose.statistics import auroc
from e3rl.errors import UserError
from e3rl.rollout.judge import GroupJudge
from e3rl.rollout.metric import siblings_metric, toy_candidate
from e3rl.rollout.moments import Distribution, Moments
from e3rl.rollout.statistics import CalibrationStatistics
from e3rl.rollout.value import FEATURES, KEPT, PRIOR, STRENGTH, ValueHead, by_place, features, pairs
from e3rl.types import Candidate, Group, Problem, Prompt, Reward, RewardedGroup, Segment, Trajectory, Verdict

_PROMPT = Prompt(Problem("p", "1+1"), (2, 3))
_EOS_RANK = 20
NAMES = list(FEATURES)


def _candidate(entropies: Sequence[float], perturbation: float = 0.0, rank: int = 1, ended: bool = False) -> Candidate:
    size = len(entropies)
    ones = (1.0,) * size
    eps = (perturbation,) * size
    return Candidate(
        tuple(range(4, 4 + size)), tuple(-h for h in entropies), entropies, eps, ones, (rank,) * size, ended
    )


def _group(responses: Sequence[tuple[Sequence[Candidate], float | None]]) -> RewardedGroup:
    trajectories = [
        Trajectory(_PROMPT, n, tuple(Segment(i, c, None) for i, c in enumerate(candidates)), (), "stop")
        for n, (candidates, _) in enumerate(responses)
    ]
    rewards = tuple(Reward(value, {"lab": value}) for _, value in responses)
    return RewardedGroup(Group(_PROMPT, tuple(trajectories), 0), rewards)


def test_without_labels_u_is_entropy_and_a_share_of_the_perturbation() -> None:
    candidates = [_candidate((0.2, 1.0), 0.5, rank=7), _candidate((0.3,), 2.0, ended=True)]
    found = siblings_metric("value")(candidates, [(), (0.4, 0.1)], Moments(), ErasureConfig(), list)
    assert [u.total for u in found] == pytest.approx([0.6 + 0.3 * 0.5, 0.3 + 0.3 * 2.0])
    assert [u.smoothed for u in found] == [u.total for u in found]


def test_features_by_value() -> None:
    candidate = Candidate((5, 6), (-0.5, -1.5), (0.2, 0.6), (0.0, 0.9), (1.0, 1.0), (1, 8), True)
    expected = [0.4, 0.45, 0.6, 0.6, 0.9, 1.0, np.log(8), np.log(2), np.log(3), 0.7, 1.0]
    assert features(candidate, (0.5, 0.9)) == pytest.approx(expected)
    assert len(expected) == len(FEATURES)


def test_pairs_are_of_one_place_and_unequal_rewards() -> None:
    """Two places: at the first, one bad and two good siblings; at the second one of each. What has no reward is left out."""
    group = _group(
        [
            ([_candidate((0.1,)), _candidate((0.5,))], 1.0),
            ([_candidate((0.7,)), _candidate((0.9,))], 0.0),
            ([_candidate((0.2,))], 1.0),
            ([_candidate((9.0,))], None),
        ]
    )
    (first, first_rewards), (second, second_rewards) = by_place(group)
    differences, weights = pairs(first, first_rewards)
    assert differences[:, NAMES.index("mean entropy")] == pytest.approx([0.6, 0.5])
    assert weights.tolist() == pytest.approx([2 / 3, 2 / 3])  # 1 bad and 2 good: 2 * 1 * 2 / 3
    assert second[:, NAMES.index("mean entropy of the segments before")] == pytest.approx([0.1, 0.7])
    differences, weights = pairs(second, second_rewards)
    assert differences[:, NAMES.index("mean entropy")] == pytest.approx([0.4])
    assert weights.tolist() == [1.0]


def test_an_update_is_the_minimum_that_its_loss_says() -> None:
    """The posterior mode by hand, for one pair that differs in its rank alone: the root of P d = w x / (1 + e^{x d})."""
    right, wrong = _candidate((0.5,)), _candidate((0.5,), rank=_EOS_RANK)
    head = PRIOR.taught([_group([([wrong], 0.0), ([right], 1.0)])])
    x, low, high = np.log(_EOS_RANK), 0.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if STRENGTH * middle < x / (1 + np.exp(x * middle)) else (low, middle)
    place = NAMES.index("log of the largest rank")
    learnt = np.array(head.weights) - np.array(PRIOR.weights)
    assert learnt[place] == pytest.approx(low, rel=1e-9)
    assert np.delete(learnt, place) == pytest.approx(0.0, abs=1e-12)
    odds = 1 / (1 + np.exp(x * low))
    precision = np.array(head.precision)
    assert precision[place, place] == pytest.approx(STRENGTH + odds * (1 - odds) * x * x)
    assert (head.version, head.responses, head.right, head.tokens) == (1, 2, 1, 2)


def test_what_was_learnt_is_zero_on_average_and_lifted() -> None:
    """Both have entropy 0.5; what was learnt lies one standard deviation above and below its mean, and U three above that."""
    right, wrong = _candidate((0.5,)), _candidate((0.5,), rank=_EOS_RANK)
    head = PRIOR.taught([_group([([wrong], 0.0), ([right], 1.0)])] * 200)
    scores = [head.suspicion(features(c, ())) for c in (wrong, right)]
    distance = head.weights[NAMES.index("log of the largest rank")] * np.log(_EOS_RANK) / 2
    assert distance > 1
    assert scores == pytest.approx([0.5 + 4 * distance, 0.5 + 2 * distance])
    assert head.usual == pytest.approx(sum(scores) / 2)
    assert head.suspicion(features(_candidate((0.0,)), (9.0,))) >= 0
    assert replace(head, lift=-9.0).suspicion(features(right, ())) == 0.0


def test_without_labels_it_returns_to_where_it_began() -> None:
    """Equal rewards make no pairs; each update keeps a share of the precision that was learnt, and the prior takes the rest."""
    right, wrong = _candidate((0.5,)), _candidate((0.5,), rank=_EOS_RANK)
    head = PRIOR.taught([_group([([wrong], 0.0), ([right], 1.0)])] * 50)
    place = NAMES.index("log of the largest rank")
    known = np.array(head.precision)
    later = head.taught([_group([([right], 1.0), ([right], 1.0)])])
    assert later.precision[place][place] == pytest.approx(KEPT * known[place, place] + (1 - KEPT) * STRENGTH)
    share = KEPT * known[place, place] / later.precision[place][place]
    assert later.weights[place] == pytest.approx(share * head.weights[place])


@pytest.mark.parametrize("seed", range(3))
def test_it_learns_a_sign_that_entropy_does_not_show(seed: int) -> None:
    """Wrong responses draw an unlikely token somewhere; their entropies are as those of right ones."""
    rng = np.random.default_rng(seed)

    def group() -> RewardedGroup:
        responses = []
        for _ in range(8):
            wrong = rng.random() < 0.5
            ranks = 1 + int(rng.poisson(6 if wrong else 2))
            responses.append(([_candidate(rng.random(3).tolist(), rng.random(), ranks)], float(not wrong)))
        return _group(responses)

    head = PRIOR
    for _ in range(20):
        head = head.taught([group() for _ in range(4)])
    tests = [group() for _ in range(60)]
    graded = [pair for g in tests for pair in zip(g.group.trajectories, g.rewards, strict=True)]
    rows = [(features(t.segments[0].candidate, ()), r.value == 0) for t, r in graded]
    wrong = np.array([bad for _, bad in rows])
    before, after = (auroc(np.array([h.suspicion(row) for row, _ in rows]), wrong) for h in (PRIOR, head))
    assert before == pytest.approx(0.5, abs=0.08)
    assert after > 0.85


def test_every_bit_of_it_is_kept(tmp_path) -> None:
    rng = np.random.default_rng(0)
    responses = [([_candidate(rng.random(3).tolist(), rng.random())], float(n % 2)) for n in range(6)]
    head = PRIOR.taught([_group(responses)])
    statistics = CalibrationStatistics({}, head=head)
    assert CalibrationStatistics.from_tables(json.loads(json.dumps(statistics.to_tables()))).head == head
    assert statistics.merged(CalibrationStatistics({})).head == head
    assert statistics.taught([_group(responses)]).head == head.taught([_group(responses)]) != head
    assert CalibrationStatistics({}).taught([_group(responses)]).head is None


@pytest.mark.parametrize(
    "harm",
    [
        {"features": NAMES[1:]},
        {"weights": [0.0]},
        {"precision": [[1.0]]},
        {"tokens": float("nan")},
        {"centre": [float("inf")] * len(NAMES)},
    ],
)
def test_a_damaged_one_is_refused(harm: dict[str, object]) -> None:
    with pytest.raises((KeyError, ValueError)):
        ValueHead.from_table(PRIOR.to_table() | harm)


def test_a_judge_uses_the_head_of_its_statistics() -> None:
    head = replace(PRIOR, weights=(0.0, 0.0, 0.0, 2.0, *PRIOR.weights[4:]))
    found = siblings_metric("value", head)([toy_candidate((0.2, 1.5, 0.7))], [()], Moments(), ErasureConfig(), list)
    assert found[0].total == pytest.approx(1.4)


def _opened(head: ValueHead, entropies: Sequence[float], **settings: float) -> list[tuple[float, Verdict]]:
    """B and verdict of siblings' first candidates of three tokens each, whose U is their entropy."""
    config = ErasureConfig(metric="value", baseline="reservation", eta=0.0, rho=0.0, **settings)
    judge = GroupJudge(len(entropies), config, CalibrationStatistics({}, head=head))
    candidates = [_candidate((level,) * 3) for level in entropies]
    for sibling, candidate in enumerate(candidates):
        judge.deliver(sibling, candidate)
    judgements = [judge.judge(sibling, candidate, 0) for sibling, candidate in enumerate(candidates)]
    return [(j.threshold.baseline, j.verdict) for j in judgements]


def test_a_segment_is_erased_where_a_retry_is_worth_its_tokens() -> None:
    """A fifth of the responses is right, of 8 tokens each; mean U is 1, so log odds are log 1/4 + 1 - U. Three tokens cost
    0.2 * 3 / 8 right answers."""
    head = replace(PRIOR, centre=(1.0, *PRIOR.centre[1:]), responses=10.0, right=2.0, tokens=80.0)
    odds = np.log(0.25) + 1
    better = 1 / (1 + np.exp(0.5 - odds))
    z = better - 2 * 0.2 * 3 / 8  # of two siblings the better one alone is above it
    commit, erase = Verdict.COMMIT, Verdict.ERASE
    assert _opened(head, (0.5, 3.0)) == [(pytest.approx(odds - np.log(z / (1 - z))), v) for v in (commit, erase)]
    assert [v for _, v in _opened(head, (0.5, 0.6))] == [commit, commit], "alike"
    assert [v for _, v in _opened(head, (6.0, 9.0))] == [commit, commit], "hopeless"
    assert [v for _, v in _opened(head, (0.5, 3.0), retry_cost=3.0)] == [commit, commit], "too dear"
    assert [v for _, v in _opened(head, (0.5, 0.6), retry_cost=0.0)] == [commit, erase], "for nothing"
    assert [v for _, v in _opened(PRIOR, (0.5, 3.0))] == [commit, commit], "no reward is known yet"


def test_a_single_sample_is_held_against_the_markers_of_the_statistics() -> None:
    config = ErasureConfig(metric="value", baseline="reservation", eta=0.0, rho=0.0)
    head = replace(PRIOR, centre=(1.0, *PRIOR.centre[1:]), responses=10.0, right=2.0, tokens=80.0)
    known = CalibrationStatistics({}, (Distribution.of([0.5, 3.0]),), head=head)
    found = []
    for level in (0.5, 3.0):
        judge = GroupJudge(1, config, known)
        candidate = _candidate((level,) * 3)
        judge.deliver(0, candidate)
        found.append(judge.judge(0, candidate, 0))
    assert [j.verdict for j in found] == [Verdict.COMMIT, Verdict.ERASE]
    assert found[0].threshold.baseline == _opened(head, (0.5, 3.0))[0][0]


def test_a_reservation_needs_log_odds() -> None:
    with pytest.raises(UserError, match=r"'reservation' needs U in log odds.*'e3rl'"):
        ErasureConfig(baseline="reservation")


def test_a_multiple_of_the_prior_is_learnt_at_once_and_its_direction_kept() -> None:
    """The response of higher entropy and ε is always the wrong one: log odds grow along (1, 0.3), and hardly across."""
    wrong, right = _candidate((0.9,), 0.6), _candidate((0.4,), 0.1)
    head = PRIOR.taught([_group([([wrong], 0.0), ([right], 1.0)])] * 20)
    entropy, eps, *others = np.array(head.weights)
    assert entropy > 3
    assert eps / entropy == pytest.approx(0.3, abs=0.1)
    assert np.abs(others).max() < 0.5
