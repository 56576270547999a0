"""The stream of a draw: pinned by value, uniform, and different for every draw."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from e3rl.engine.requests import draw_key, uniforms
from e3rl.types import Draw

DRAW = Draw(seed=1, step=2, prompt_id="gsm-7", sibling=3, segment=4, attempt=5)


def test_stream_is_pinned_by_value():
    first, second = uniforms(DRAW, 4), uniforms(dataclasses.replace(DRAW, attempt=6), 2)
    assert first.tolist() == [
        0.7179723938469299,
        0.9146166131575864,
        0.2929845419153714,
        0.26474973686262493,
    ]
    assert second.tolist() == [0.02882789472155267, 0.5710352924954746]


def test_a_longer_stream_starts_with_the_shorter():
    assert uniforms(DRAW, 50)[:7].tolist() == uniforms(DRAW, 7).tolist()


@pytest.mark.parametrize("field", ["seed", "step", "sibling", "segment", "attempt"])
def test_every_field_changes_the_stream(field):
    other = dataclasses.replace(DRAW, **{field: 99})
    assert not set(uniforms(other, 100)) & set(uniforms(DRAW, 100))


def test_fields_do_not_run_into_each_other():
    texts = ["", "1", "5|1", "1|5", "é", "\ud800", "5"]
    draws = [Draw(1, 1, text, sibling, 1, attempt) for text in texts for sibling in (1, 11) for attempt in (1, 11, 15)]
    assert len({draw_key(draw) for draw in draws}) == len(draws)


def test_numbers_are_uniform_and_uncorrelated_between_attempts():
    streams = np.stack([uniforms(dataclasses.replace(DRAW, attempt=a), 2000) for a in range(20)])
    assert streams.min() >= 0
    assert streams.max() < 1
    counts = np.histogram(streams, bins=50, range=(0, 1))[0]
    expected = streams.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 49 + 4 * np.sqrt(2 * 49)
    off_diagonal = np.corrcoef(streams)[~np.eye(20, dtype=bool)]
    assert abs(off_diagonal).max() < 5 / np.sqrt(2000)


def test_no_numbers_are_asked_for():
    assert uniforms(DRAW, 0).shape == (0,)
