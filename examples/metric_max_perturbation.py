"""A complete uncertainty metric from outside the package: how far the worst token of a candidate was from the greedy one.

Train with it:   e3rl train RECIPE erasure.metric=examples/metric_max_perturbation.py:max_perturbation
Check it alone:  python examples/metric_max_perturbation.py

A metric is one pure function. It sees the candidate (log-probabilities, entropies and perturbations of its tokens), the
mean entropies of the sibling's committed segments, moments of the group's token entropies, and the [erasure] settings. It
returns an `Uncertainty`; thresholds, erasure and everything behind them stay as they are. Entropy says how many ways were
open, the perturbation of eq 5 says how unlikely the way was that this draw took: siblings with the same prefix differ in
the second much more than in the first.
"""

from __future__ import annotations

from collections.abc import Sequence

from e3rl.config import ErasureConfig
from e3rl.rollout.metric import single_term
from e3rl.rollout.moments import Moments
from e3rl.types import Candidate, Uncertainty


def max_perturbation(
    candidate: Candidate, history: Sequence[float], reference: Moments, config: ErasureConfig
) -> Uncertainty:
    """The largest log p(argmax) - log p(sampled) of the candidate's tokens."""
    return single_term(max(candidate.perturbations))


if __name__ == "__main__":
    from e3rl.testing.metric import check_metric

    check_metric(max_perturbation)
    print("max_perturbation keeps the contract of a metric.")
