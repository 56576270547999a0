"""The contract of an uncertainty metric, as a test that its author can import and run.

from e3rl.testing.metric import check_metric

def test_contract():
    check_metric(my_metric)
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from e3rl.config import ErasureConfig
from e3rl.rollout.metric import UncertaintyMetric, broken, check_metric_runs, measure, toy_candidate
from e3rl.rollout.moments import Moments

_ENTROPIES = ((0.0,), (2.3,), (0.0, 0.0, 0.0), (0.2, 1.5, 0.7), tuple(0.1 * (i % 17) for i in range(40)))
_HISTORIES: tuple[tuple[float, ...], ...] = ((), (0.0,), (0.4, 1.2, 0.8, 0.1, 0.5))
_REFERENCES = (Moments(), Moments.of((0.5, 0.5)), Moments.of((0.1, 0.9, 1.4)))
_SETTINGS = (ErasureConfig(), replace(ErasureConfig(), base_weight=0.0, gradient_weight=0.0, perturbation_weight=1.0))


def check_metric(metric: UncertaintyMetric, name: str | None = None) -> None:
    """Raises UserError, naming the broken clause, unless ``metric`` keeps the whole contract.

    It must measure candidates of one token and of many, flat ones, with and without history, against references without
    any spread, and give the same answer twice.
    """
    called = name or str(getattr(metric, "__name__", type(metric).__name__))
    check_metric_runs(called, metric)
    candidates = [toy_candidate(entropies, perturbation) for entropies in _ENTROPIES for perturbation in (0.0, 1.7)]
    for candidate, history, reference, config in product(candidates, _HISTORIES, _REFERENCES, _SETTINGS):
        first = measure(called, metric, candidate, history, reference, config)
        if measure(called, metric, candidate, history, reference, config) != first:
            raise broken(called, "the same candidate got two different U; keep no state, draw nothing")
