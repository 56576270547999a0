"""Siblings measured together have the U that each has alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.config import ErasureConfig
from e3rl.rollout.columns import NUMBERS
from e3rl.rollout.metric import e3rl_uncertainty, load_metric, siblings_metric, toy_candidate
from e3rl.rollout.moments import Moments
from e3rl.rollout.statistics import MEASURED_BY
from e3rl.types import TERMS

_ENTROPIES = st.lists(st.floats(0.0, 5.0), min_size=1, max_size=5)
_SIBLING = st.tuples(_ENTROPIES, st.floats(0.0, 3.0), st.lists(st.floats(0.0, 5.0), max_size=3))
_CONFIG = ErasureConfig(gradient_weight=0.4, extremum_weight=0.3, perturbation_weight=0.2, smoothing_window=2)
_REFERENCE = Moments.of((0.1, 0.9, 1.4))


@pytest.mark.parametrize("config", [_CONFIG, replace(_CONFIG, length_exponent=0.5)])
@given(siblings=st.lists(_SIBLING, min_size=1, max_size=6))
def test_siblings_of_any_lengths_are_measured_as_each_alone(
    config: ErasureConfig, siblings: Sequence[tuple[list[float], float, list[float]]]
) -> None:
    candidates = [toy_candidate(entropies, perturbation) for entropies, perturbation, _ in siblings]
    histories = [history for _, _, history in siblings]
    together = siblings_metric("e3rl")(candidates, histories, _REFERENCE, config, list)
    alone = [e3rl_uncertainty(c, h, _REFERENCE, config) for c, h in zip(candidates, histories, strict=True)]
    assert [astuple(u) for u in together] == [pytest.approx(astuple(u), rel=1e-12, abs=1e-12) for u in alone]


def test_a_metric_from_outside_is_asked_for_each_sibling() -> None:
    name = "examples/metric_max_perturbation.py:max_perturbation"
    candidates, histories = [toy_candidate(perturbation=p) for p in (0.3, 0.1)], [(), (0.6,)]
    together = siblings_metric(name)(candidates, histories, _REFERENCE, _CONFIG, list)
    assert [u.total for u in together] == [
        load_metric(name)(c, h, _REFERENCE, _CONFIG).total for c, h in zip(candidates, histories, strict=True)
    ]


def test_a_long_candidate_counts_for_more_the_larger_the_exponent() -> None:
    """Four calm tokens of mean 0.5 and ε 0.25 against one of 0.8: by means 0.55 and 0.85, by root 1.1, by sums 2.2."""
    only_means = ErasureConfig(gradient_weight=0.0, extremum_weight=0.0, perturbation_weight=0.2)
    long, short = toy_candidate((0.4, 0.6, 0.7, 0.3), 0.25), toy_candidate((0.8,), 0.25)
    for exponent, totals in ((0.0, (0.55, 0.85)), (0.5, (1.1, 0.85)), (1.0, (2.2, 0.85))):
        config = replace(only_means, length_exponent=exponent)
        found = [e3rl_uncertainty(c, (), _REFERENCE, config) for c in (long, short)]
        assert [u.total for u in found] == pytest.approx(totals)
        assert found[0].smoothed == pytest.approx(0.5 * 4**exponent)  # what eq 18 holds against the baseline


@pytest.mark.parametrize("term", TERMS)
def test_a_term_has_a_weight_that_statistics_name_and_a_place_in_the_sum(term: str):
    """With that weight alone U is the term, and doubles with it."""
    alone = replace(ErasureConfig(), **{f"{other}_weight": float(other == term) for other in TERMS})
    twice = replace(alone, **{f"{term}_weight": 2.0})
    once, more = (e3rl_uncertainty(toy_candidate(), (0.6, 0.9), _REFERENCE, config) for config in (alone, twice))
    assert once.total == getattr(once, term) > 0
    assert more.total == 2 * once.total
    assert f"{term}_weight" in MEASURED_BY
    assert term in NUMBERS
