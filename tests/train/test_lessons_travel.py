"""Lessons between ranks: what arrives is what was sent, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from e3rl.train.lessons import ImportanceWeights, Lesson, lessons_from_bytes, lessons_to_bytes
from e3rl.train.packing import group_sequences
from e3rl.train.scoring import Scores
from tests.train.rollouts import rewarded_group


@pytest.mark.parametrize(
    "full", [{1, 2}, set(), {1}, {2}], ids=["with all parts", "without some", "the second without", "the first without"]
)
def test_lessons_arrive_as_they_were_sent(full: set[int]):
    """Some lessons have no shares, reference and weights, all or those of erased candidates."""
    sequences = group_sequences([rewarded_group("first", [1.0, 0.0, 1.0], [[4, 2], [4, 4, 1], [3]]).group], False)
    generator, sent = torch.Generator().manual_seed(0), []
    for sequence in sequences[:0:-1]:  # some of them, in another order
        numbers = torch.randn(6, len(sequence.response_ids), generator=generator)
        lesson = Lesson(sequence, Scores(numbers[0], numbers[1], None), None, numbers[2], 3)
        if len(sent) + 1 in full:
            weights = ImportanceWeights(numbers[5], numbers[5] > 0)
            scores = replace(lesson.scores, shares_T=numbers[3])
            lesson = replace(lesson, scores=scores, reference_logprobs_T=numbers[4], importance=weights)
        sent.append(lesson)
    found = lessons_from_bytes(lessons_to_bytes(sent, sequences), sequences)
    assert len(found) == len(sent) == 2
    for mine, theirs in zip(found, sent, strict=True):
        assert mine.sequence is theirs.sequence
        assert mine.group_size == theirs.group_size
        pairs = [
            (mine.scores.logprobs_T, theirs.scores.logprobs_T),
            (mine.scores.entropies_T, theirs.scores.entropies_T),
            (mine.scores.shares_T, theirs.scores.shares_T),
            (mine.reference_logprobs_T, theirs.reference_logprobs_T),
            (mine.advantages_T, theirs.advantages_T),
            (mine.importance and mine.importance.weights_T, theirs.importance and theirs.importance.weights_T),
            (mine.importance and mine.importance.limited_T, theirs.importance and theirs.importance.limited_T),
        ]
        assert all(a is b if b is None else torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    assert lessons_from_bytes(lessons_to_bytes([], sequences), sequences) == []
