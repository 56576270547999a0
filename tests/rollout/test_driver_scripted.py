"""The scripted engine keeps the engine's contract, refuses misuse, and its clock is right."""

from __future__ import annotations

import pytest

from e3rl.engine.protocol import Row, Sampling
from e3rl.testing.scripted import EOS, Key, Misuse, Scripted, ScriptedEngine, scripted_candidate
from e3rl.types import Draw

SAMPLING = Sampling()


def draw(sibling: int = 0, segment: int = 0, attempt: int = 0) -> Draw:
    return Draw(0, 0, "p", sibling, segment, attempt)


def engine(**settings) -> ScriptedEngine:
    return ScriptedEngine(lambda d, tokens: Scripted((0.5,) * tokens), **settings)


def test_entries_by_key():
    scripted = ScriptedEngine({Key("p", 0, 0): Scripted((0.5, 2.0), (0.0, 0.3), ended=True)})
    (row,) = scripted.prefill([1], 1)
    scripted.extend(row, 5, draw(), SAMPLING)
    ((delivered, candidate),) = scripted.poll()
    assert delivered == row
    assert candidate.entropies.tolist() == [0.5, 2.0]
    assert candidate.perturbations.tolist() == pytest.approx([0.0, 0.3])
    assert (candidate.ended, candidate.ids[-1], scripted.length(row)) == (True, EOS, 2)
    with pytest.raises(Misuse, match=r"no entry for Key\(prompt_id='p', sibling=0, segment=1, attempt=0\)"):
        scripted.extend(row, 5, draw(segment=1), SAMPLING)


def test_cutting_a_candidate_cuts_its_ending():
    scripted = Scripted((0.1, 0.2, 0.3), ended=True)
    cut, whole = (scripted_candidate(draw(), scripted, n) for n in (2, 3))
    assert cut.entropies.tolist() == pytest.approx([0.1, 0.2])
    assert (cut.ended, EOS in cut.ids) == (False, False)
    assert (whole.ended, whole.ids[:2].tolist()) == (True, cut.ids.tolist())
    assert scripted_candidate(draw(attempt=1), scripted, 3).ids[:2].tolist() != cut.ids.tolist()


def test_script_that_says_too_little():
    with pytest.raises(Misuse, match="2 of 3 tokens and no ending"):
        scripted_candidate(draw(), Scripted((0.1, 0.2)), 3)
    with pytest.raises(Misuse, match="1 perturbations for 2 entropies"):
        Scripted((0.1, 0.2), (0.1,))


def test_clock():
    scripted = engine(max_rows=2)
    rows = scripted.prefill([1], 3)
    for row, tokens in zip(rows, (2, 5, 4), strict=True):
        scripted.extend(row, tokens, draw(row), SAMPLING)
    polled = []
    while completed := scripted.poll():
        polled.append((scripted.clock, [row for row, _ in completed]))
    assert polled == [(2, [0]), (5, [1]), (6, [2])]  # row 2 starts when row 0 is done
    assert scripted.batch_sizes == [2, 2, 2, 2, 2, 1]


def test_rollback_and_release():
    scripted = engine(cache_rows=2)
    row, other = scripted.prefill([1], 2)
    scripted.extend(row, 4, draw(), SAMPLING)
    scripted.poll()
    scripted.rollback(row, 1)
    assert (scripted.length(row), scripted.free_rows()) == (1, 0)
    scripted.extend(other, 4, draw(1), SAMPLING)
    scripted.release(other)
    assert (scripted.poll(), scripted.held, scripted.free_rows()) == ([], 1, 1)
    assert scripted.prefill([1], 1) == [2]


@pytest.mark.parametrize(
    ("misuse", "says"),
    [
        (lambda e: e.extend(Row(0), 1, draw(), SAMPLING), "has an open request"),
        (lambda e: e.rollback(Row(0), 0), "has an open request"),
        (lambda e: e.rollback(Row(1), 1), "rollback of row 1 to 1 tokens, it has 0"),
        (lambda e: e.release(Row(2)), "row 2 is not held"),
        (lambda e: e.length(Row(9)), "row 9 is not held"),
        (lambda e: e.prefill([1], 3), "prefill of 3 rows, 2 are free"),
        (lambda e: e.load_weights({}, 1), "load_weights while 2 rows are held"),
    ],
)
def test_misuse(misuse, says):
    scripted = engine(cache_rows=4)
    scripted.prefill([1], 3)
    scripted.release(Row(2))
    scripted.extend(Row(0), 2, draw(), SAMPLING)
    with pytest.raises(Misuse, match=says):
        misuse(scripted)
