"""Uncertainty and thresholds of one group (eq 10-18): bookkeeping around the equations, knowing nothing of engines.

Segments count from 0. What segment n is judged against is fixed once, when its barrier opens: when every sibling has
either finished or delivered its first candidate of n. Siblings are always visited by number, so the order in which
candidates arrive changes no digit.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from e3rl.config import ErasureConfig
from e3rl.engine.requests import uniforms
from e3rl.equations import erasure, threshold
from e3rl.errors import UserError
from e3rl.rollout.metric import CandidatePlace, siblings_metric
from e3rl.rollout.moments import Moments
from e3rl.rollout.statistics import CalibrationStatistics
from e3rl.rollout.value import PRIOR
from e3rl.types import Candidate, Judgement, Threshold, Uncertainty, Verdict

_log = logging.getLogger(__name__)

_FROM_SIBLINGS = ("group", "quantile", "reservation")
"""The baselines that are taken from the group's own first candidates."""

ROUNDING = 1e-9
"""Share by which a computed baseline is raised, so that siblings that are all alike are not erased over rounding."""


def needs_calibration(siblings: int, config: ErasureConfig) -> bool:
    """Whether B_n has to come from calibration statistics: asked for, or no group is large enough for its own."""
    too_few = config.baseline in _FROM_SIBLINGS and siblings < config.min_siblings
    return config.baseline == "reference" or too_few


def require_calibration(siblings: int, config: ErasureConfig, calibration: CalibrationStatistics | None) -> None:
    """Raise UserError where thresholds need calibration statistics or a static baseline that are not there."""
    if config.baseline == "static" and not config.static_baseline:
        raise UserError(
            "erasure.baseline = 'static' needs erasure.static_baseline, and it is 0: 'e3rl calibrate' finds a value for the "
            "model and saves it in e3rl_recipe.toml, which can be laid on a recipe with --overlay"
        )
    if not needs_calibration(siblings, config):
        return
    if calibration is None or not calibration.segments:
        why = (
            "erasure.baseline = 'reference'"
            if config.baseline == "reference"
            else f"{siblings} sample(s) of a prompt are fewer than erasure.min_siblings = {config.min_siblings}"
        )
        raise UserError(
            f"{why}, so thresholds come from calibration statistics, and the model has none: make them with "
            "'e3rl calibrate', sample more of each prompt, or set erasure.baseline = 'static'"
        )
    if config.baseline in ("quantile", "reservation") and not all(usual.markers for usual in calibration.segments):
        raise UserError(
            f"the model's calibration statistics hold no quantiles of U, which erasure.baseline = '{config.baseline}' needs: "
            "make them again with 'e3rl calibrate'"
        )


@dataclass(frozen=True, slots=True)
class _Statistics:
    """What every candidate of one segment index is judged against."""

    entropies: Moments
    baseline: float


@dataclass(slots=True)
class _History:
    """What the judge was told about one sibling, by segment index."""

    firsts: list[Candidate] = field(default_factory=list)
    opened: dict[int, tuple[Uncertainty, Threshold]] = field(default_factory=dict)
    """U and Theta(0) of the firsts that were there when their segment opened."""
    committed: list[Candidate] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)
    modulations: list[float] = field(default_factory=list)  # phi, of the segments judged so far

    def present(self, segment: int) -> bool:
        """Whether it has a first candidate of the segment."""
        return len(self.firsts) > segment


def _nowhere(sibling: int) -> CandidatePlace:
    raise UserError(
        "erasure.metric needs to know what a candidate follows, which is known only while a response is generated: a plain "
        "response can't be judged by it afterwards"
    )


class GroupJudge:
    """Judges the candidates of one group of siblings.

    ``place`` says where a sibling's latest candidate stands, for metrics that ask.

    ``entropy_moments`` are the previous rollout batch's, used where ``config.entropy_reference`` is 'batch'; without
    them (the first batch) the group's own stand in. Where the baseline comes from ``calibration``, so do the entropy
    moments, unless they are the batch's.
    """

    def __init__(
        self,
        siblings: int,
        config: ErasureConfig,
        calibration: CalibrationStatistics | None = None,
        entropy_moments: Moments | None = None,
        place: Callable[[int], CandidatePlace] = _nowhere,
    ) -> None:
        require_calibration(siblings, config, calibration)
        self._config = config
        self._head = (calibration and calibration.head) or PRIOR
        self._metric, self._place = siblings_metric(config.metric, self._head), place
        self._calibration = calibration if needs_calibration(siblings, config) else None
        self._fixed_entropies = entropy_moments if config.entropy_reference == "batch" else None
        if self._fixed_entropies is None and self._calibration is not None:
            self._fixed_entropies = self._calibration.entropies
        self._pooled_entropies = Moments()
        self._histories = [_History() for _ in range(siblings)]
        self._reached: list[float] = [0] * siblings  # segments whose first candidate no longer has to be waited for
        self._statistics: list[_Statistics] = []

    def deliver(self, sibling: int, candidate: Candidate) -> None:
        """The first candidate of the sibling's next segment was generated."""
        self._histories[sibling].firsts.append(candidate)
        self._reached[sibling] += 1

    def commit(self, sibling: int, candidate: Candidate, judgement: Judgement) -> None:
        """The candidate became the sibling's next segment."""
        history = self._histories[sibling]
        history.committed.append(candidate)
        history.attempts.append(judgement.attempt)
        history.means.append(fmean(candidate.entropies.tolist()))
        history.smoothed.append(judgement.uncertainty.smoothed)

    def expects(self, sibling: int) -> bool:
        """Whether the sibling's next candidate is the first of its segment: not so in a turn that is drawn again."""
        history = self._histories[sibling]
        return len(history.firsts) == len(history.committed)

    def rollback(self, sibling: int, segments: int) -> None:
        """A turn was erased: the sibling is back at so many committed segments. Its first candidates keep counting."""
        history = self._histories[sibling]
        for kept in (history.committed, history.attempts, history.means, history.smoothed, history.modulations):
            del kept[segments:]

    def finish(self, sibling: int) -> None:
        """The sibling's response is complete: no barrier waits for it any more."""
        self._reached[sibling] = math.inf

    def ready(self, segment: int) -> bool:
        """Whether candidates of ``segment`` can be judged; with statistics from outside the group they always can."""
        independent = self._fixed_entropies is not None and not self._has_group_baseline
        return independent or segment < min(self._reached)

    def judge(self, sibling: int, candidate: Candidate, attempt: int) -> Judgement:
        """U, Theta and verdict of a candidate for the sibling's next segment."""
        history = self._histories[sibling]
        segment = len(history.committed)
        if not self.ready(segment):
            raise RuntimeError(f"segment {segment} can't be judged yet: a sibling's first candidate is still missing")
        if segment == len(self._statistics):
            self._open(segment)
        if segment == len(history.modulations):
            self._modulate([history])
        statistics = self._statistics[segment]
        if attempt == 0 and segment in history.opened and candidate is history.firsts[segment]:
            u, theta = history.opened[segment]
        else:
            latest = [candidate], [history.means], statistics.entropies
            u = self._metric(*latest, self._config, lambda: [self._place(sibling)])[0]
            theta = self._thresholds([history.modulations[segment]], statistics.baseline, attempt)[0]
        verdict = erasure.judge(u.total, theta.total, attempt, self._config.max_erasures)
        spared = verdict is Verdict.ERASE and self._config.commit_anyway > self._chance(sibling)
        return Judgement(u, theta, attempt, Verdict.SPARED if spared else verdict)

    def _chance(self, sibling: int) -> float:
        """A number in [0, 1) by the name of the sibling's latest draw, as everything that is drawn."""
        if self._config.commit_anyway == 0:
            return 0.0
        draw = self._place(sibling).draw
        return float(uniforms(replace(draw, prompt_id=f"spared/{draw.prompt_id}"), 1)[0])

    @property
    def _has_group_baseline(self) -> bool:
        return self._calibration is None and self._config.baseline in _FROM_SIBLINGS

    def _open(self, segment: int) -> None:
        """Fix the statistics that the segment's candidates are judged against, and measure all present siblings together."""
        entropies = self._fixed_entropies
        if entropies is None:
            entropies = self._pooled_entropies = self._pool(segment)
        numbers = [i for i, h in enumerate(self._histories) if h.present(segment) and len(h.committed) == segment]
        here = [self._histories[i] for i in numbers]
        firsts, means = [h.firsts[segment] for h in here], [h.means for h in here]
        uncertainties = self._metric(firsts, means, entropies, self._config, lambda: [self._place(i) for i in numbers])
        tokens = fmean(len(c.ids) for c in firsts) if firsts else 0.0
        baseline = self._baseline([u.total for u in uncertainties], segment, tokens)
        self._modulate(here)
        thresholds = self._thresholds([h.modulations[segment] for h in here], baseline, 0)
        for history, u, theta in zip(here, uncertainties, thresholds, strict=True):
            history.opened[segment] = u, theta
        self._statistics.append(_Statistics(entropies, baseline))

    def _pool(self, segment: int) -> Moments:
        """Token entropies of first candidates of segments m <= n, and of committed retries of segments m < n."""
        pooled, last = self._pooled_entropies, segment - 1
        for history in self._histories:
            if segment > 0 and len(history.committed) > last and history.committed[last] is not history.firsts[last]:
                pooled = pooled.merged(Moments.of(history.committed[last].entropies))
        for history in self._histories:
            if history.present(segment):
                pooled = pooled.merged(Moments.of(history.firsts[segment].entropies))
        return pooled

    def _baseline(self, totals: Sequence[float], segment: int, tokens: float) -> float:
        """B_n from where `ErasureConfig.baseline` says; ``totals``: U of the siblings that are there, ``tokens`` their mean."""
        if self._calibration is not None:
            usual = self._calibration.at(segment)
            if self._config.baseline == "quantile":
                return self._quantile_baseline(usual.markers)
            if self._config.baseline == "reservation":
                return self._reservation_baseline(usual.markers, tokens)
            return self._macro_baseline(_tensor(usual.moments.mean), _tensor(usual.moments.std))
        if self._config.baseline == "static":
            return self._config.static_baseline
        if len(totals) < self._config.min_siblings:
            return self._statistics[-1].baseline
        if self._config.baseline == "quantile":
            return self._quantile_baseline(totals)
        if self._config.baseline == "reservation":
            return self._reservation_baseline(totals, tokens)
        return self._macro_baseline(*threshold.group_moments(_tensor(totals)))

    def _quantile_baseline(self, totals: Sequence[float]) -> float:
        return _raised(float(threshold.quantile_baseline(_tensor(totals), self._config.quantile)))

    def _reservation_baseline(self, totals: Sequence[float], tokens: float) -> float:
        """A retry costs the right answers that its tokens give on average; before a reward is known, no retry is worth them."""
        head = self._head
        if not head.responses:
            return _raised(max(totals))
        success = min(max(head.right / head.responses, 0.001), 0.999)
        odds = math.log(success / (1 - success)) + head.usual
        cost = self._config.retry_cost * success * tokens * head.responses / head.tokens
        return max(_raised(threshold.reservation_baseline(_tensor(totals), odds, cost)), threshold.LOWEST_BASELINE)

    def _macro_baseline(self, mean: Tensor, std: Tensor) -> float:
        kappa = threshold.offset(std, self._config.kappa0, self._config.kappa1, self._config.sigma0)
        baseline = float(threshold.macro_baseline(mean, std, kappa))
        held = threshold.floored(baseline, float(mean))
        if held != baseline:
            _say_floored(self._config.kappa0)
            return held
        return _raised(baseline)

    def _modulate(self, histories: Sequence[_History]) -> None:
        """phi of siblings that are at the same segment, each by its own committed segments; a setting at the first."""
        committed = len(histories[0].committed)
        phis = [self._config.first_modulation] * len(histories)
        if committed:
            smoothed_GN = _tensor([h.smoothed for h in histories])
            baselines_N = _tensor([s.baseline for s in self._statistics[:committed]])
            phis = threshold.modulation(smoothed_GN, baselines_N, self._config.rho).tolist()
        for history, phi in zip(histories, phis, strict=True):
            history.modulations.append(phi)

    def _thresholds(self, phis: Sequence[float], baseline: float, attempt: int) -> list[Threshold]:
        """Theta_n(e) of siblings that are at the same segment and attempt."""
        penalty = _attempt_penalty(attempt, self._config.eta, self._config.delta)
        totals = threshold.threshold(baseline, penalty, _tensor(phis)).tolist()
        return [Threshold(total, baseline, penalty, phi) for total, phi in zip(totals, phis, strict=True)]


def _raised(baseline: float) -> float:
    return baseline + ROUNDING * abs(baseline)


@functools.cache
def _say_floored(kappa0: float) -> None:
    """Log a warning, once for each setting."""
    _log.warning(
        "erasure.kappa0 = %g puts the baseline of some segments at or below 0, where it is held at %g: their candidates are "
        "erased until the budget is spent. Raise erasure.kappa0; 'e3rl calibrate' finds one",
        kappa0,
        threshold.LOWEST_BASELINE,
    )


@functools.cache
def _attempt_penalty(attempt: int, eta: float, delta: float) -> float:
    return float(threshold.attempt_penalty(attempt, eta, delta))


def _tensor(values: float | Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float64))  # twice as fast as torch.tensor
