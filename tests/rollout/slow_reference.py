"""Eq 10-18 and 24-25 once more, from a finished group's record alone: plain loops, no code of the library's judge.

What it recomputes has to be what the record says, so a passing check also shows that the record is complete.
"""

from __future__ import annotations

import itertools
import math
import statistics

from e3rl.config import ErasureConfig, RolloutConfig
from e3rl.types import Candidate, Erasure, Group, Segment, Threshold, Trajectory, Uncertainty, Verdict

EPS = 1e-6


def candidates_of(trajectory: Trajectory, index: int) -> dict[int, Segment | Erasure]:
    """By attempt, every candidate on record for one segment."""
    records: list[Segment | Erasure] = [*trajectory.erasures, *trajectory.segments]
    return {r.judgement.attempt: r for r in records if r.index == index and r.judgement}


def entropies_up_to(group: Group, index: int) -> list[float]:
    """Tokens of first candidates up to ``index``, and of retries committed before it."""
    tokens: list[float] = []
    for trajectory in group.trajectories:
        for segment in trajectory.segments:
            if segment.index <= index:
                tokens += candidates_of(trajectory, segment.index)[0].candidate.entropies.tolist()
            if segment.index < index and segment.judgement.attempt > 0:
                tokens += segment.candidate.entropies.tolist()
    return tokens


def uncertainty_of(
    trajectory: Trajectory, index: int, candidate: Candidate, pool: list[float], config: ErasureConfig
) -> Uncertainty:
    """Eq 10-13."""
    h = candidate.entropies
    means = [statistics.fmean(s.candidate.entropies) for s in trajectory.segments[:index]] + [statistics.fmean(h)]
    weighted = [(config.smoothing_decay**w, means[-1 - w]) for w in range(config.smoothing_window + 1) if w <= index]
    smoothed = sum(a * m for a, m in weighted) / sum(a for a, _ in weighted)
    steps = [abs(b - a) for a, b in itertools.pairwise(h)]
    deviation = (max(h) - statistics.fmean(pool)) / (statistics.pstdev(pool) + EPS)
    base = config.base_weight * smoothed
    gradient = config.gradient_weight * (statistics.fmean(steps) if steps else 0.0)
    extremum = config.extremum_weight / (1 + math.exp(min(-deviation, 700.0)))  # e^710 is no float
    perturbation = config.perturbation_weight * statistics.fmean(candidate.perturbations)
    by_length = [x * len(h) ** config.length_exponent for x in (base, gradient, extremum, perturbation)]
    return Uncertainty(sum(by_length), *by_length, smoothed * len(h) ** config.length_exponent)


def baselines_of(group: Group, config: ErasureConfig) -> list[float]:
    """Eq 14-16."""
    baselines: list[float] = []
    for index in range(max(len(t.segments) for t in group.trajectories)):
        pool = entropies_up_to(group, index)
        totals = [
            uncertainty_of(t, index, candidates_of(t, index)[0].candidate, pool, config).total
            for t in group.trajectories
            if len(t.segments) > index
        ]
        if config.baseline == "static":
            baselines.append(config.static_baseline)
        elif len(totals) < config.min_siblings:
            baselines.append(baselines[-1])
        elif config.baseline == "quantile":
            ordered, place = sorted(totals), config.quantile * (len(totals) - 1)
            low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
            baseline = low + (high - low) * (place - math.floor(place))
            baselines.append(baseline + 1e-9 * abs(baseline))
        else:
            spread = statistics.pstdev(totals)
            kappa = config.kappa0 + config.kappa1 * math.tanh((spread - config.sigma0) / (config.sigma0 + EPS))
            baseline = statistics.fmean(totals) + kappa * spread
            baselines.append(baseline + 1e-9 * abs(baseline))  # what rounding may not decide
    return baselines


def threshold_of(
    trajectory: Trajectory, index: int, attempt: int, baselines: list[float], config: ErasureConfig
) -> Threshold:
    """Eq 17-18."""
    penalty = math.exp(config.eta * attempt**config.delta)
    phi = config.first_modulation
    if index:
        pairs = [(trajectory.segments[m].judgement.uncertainty.smoothed, baselines[m]) for m in range(index)]
        phi = 1 + config.rho * math.tanh(statistics.fmean((h - b) / (b + EPS) for h, b in pairs))
    return Threshold(baselines[index] * penalty * phi, baselines[index], penalty, phi)


def close(a: float, b: float) -> bool:
    """Equal but for the order of additions."""
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)


def check_numbers(group: Group, config: ErasureConfig) -> int:
    """Every recorded U, term, Theta and factor is what the record's candidates give. Returns how many it checked."""
    baselines, checked = baselines_of(group, config), 0
    for trajectory in group.trajectories:
        for index in range(len(trajectory.segments)):
            pool = entropies_up_to(group, index)
            for attempt, record in candidates_of(trajectory, index).items():
                u, theta = record.judgement.uncertainty, record.judgement.threshold
                expected_u = uncertainty_of(trajectory, index, record.candidate, pool, config)
                expected_theta = threshold_of(trajectory, index, attempt, baselines, config)
                for name in Uncertainty.__slots__:
                    assert close(getattr(u, name), getattr(expected_u, name)), (name, u, expected_u)
                for name in Threshold.__slots__:
                    assert close(getattr(theta, name), getattr(expected_theta, name)), (name, theta, expected_theta)
                checked += 1
    return checked


def check_decisions(group: Group, config: ErasureConfig) -> None:
    """Eq 24-25 hold of every record: what was erased lies above its Theta, and what was kept, below, or was forced."""
    for trajectory in group.trajectories:
        for segment in trajectory.segments:
            records = candidates_of(trajectory, segment.index)
            erased = [e for e in trajectory.erasures if e.index == segment.index]
            assert sorted(records) == list(range(len(erased) + 1)), "each attempt is on record once"
            assert len(erased) <= config.max_erasures
            assert all(e.judgement.verdict is Verdict.ERASE for e in erased)
            assert all(e.judgement.uncertainty.total > e.judgement.threshold.total for e in erased)
            above = segment.judgement.uncertainty.total > segment.judgement.threshold.total
            assert segment.judgement.verdict is (Verdict.FORCED if above else Verdict.COMMIT)
            if above:
                assert len(erased) == config.max_erasures, "a forced accept comes only when the budget is spent"
            if above and config.on_exhausted == "least_uncertain":
                totals = {attempt: r.judgement.uncertainty.total for attempt, r in records.items()}
                assert segment.judgement.attempt == min(totals, key=lambda a: (totals[a], a))


def check_shape(group: Group, config: RolloutConfig) -> None:
    """Segments are full but for the last, the response ends for the reason given, and starts add up."""
    for trajectory in group.trajectories:
        lengths = trajectory.segment_lengths
        assert all(length == config.segment_length for length in lengths[:-1])
        assert [s.index for s in trajectory.segments] == list(range(len(lengths)))
        assert not any(s.candidate.ended for s in trajectory.segments[:-1])
        ended = trajectory.segments[-1].candidate.ended
        assert trajectory.finish == ("stop" if ended else "length")
        assert ended or trajectory.committed_tokens == config.completion_limit
        assert trajectory.committed_tokens <= config.completion_limit
        assert all(e.start == sum(lengths[: e.index]) for e in trajectory.erasures)
