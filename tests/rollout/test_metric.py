"""Siblings measured together have the U that each has alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.config import ErasureConfig
from e3rl.rollout.metric import e3rl_uncertainty, load_metric, siblings_metric, toy_candidate
from e3rl.rollout.moments import Moments

_ENTROPIES = st.lists(st.floats(0.0, 5.0), min_size=1, max_size=5)
_SIBLING = st.tuples(_ENTROPIES, st.floats(0.0, 3.0), st.lists(st.floats(0.0, 5.0), max_size=3))
_CONFIG = ErasureConfig(gradient_weight=0.4, extremum_weight=0.3, perturbation_weight=0.2, smoothing_window=2)
_REFERENCE = Moments.of((0.1, 0.9, 1.4))


@given(st.lists(_SIBLING, min_size=1, max_size=6))
def test_siblings_of_any_lengths_are_measured_as_each_alone(
    siblings: Sequence[tuple[list[float], float, list[float]]],
) -> None:
    candidates = [toy_candidate(entropies, perturbation) for entropies, perturbation, _ in siblings]
    histories = [history for _, _, history in siblings]
    together = siblings_metric("e3rl")(candidates, histories, _REFERENCE, _CONFIG)
    alone = [e3rl_uncertainty(c, h, _REFERENCE, _CONFIG) for c, h in zip(candidates, histories, strict=True)]
    assert [astuple(u) for u in together] == [pytest.approx(astuple(u), rel=1e-12, abs=1e-12) for u in alone]


def test_a_metric_from_outside_is_asked_for_each_sibling() -> None:
    name = "examples/metric_max_perturbation.py:max_perturbation"
    candidates, histories = [toy_candidate(perturbation=p) for p in (0.3, 0.1)], [(), (0.6,)]
    together = siblings_metric(name)(candidates, histories, _REFERENCE, _CONFIG)
    assert [u.total for u in together] == [
        load_metric(name)(c, h, _REFERENCE, _CONFIG).total for c, h in zip(candidates, histories, strict=True)
    ]
