"""A candidate keeps its numbers as read-only arrays, whatever it was given, and is equal to one that holds the same."""

from __future__ import annotations

import dataclasses
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

from e3rl.types import COLUMNS, Candidate, Problem, Prompt, Segment, Trajectory


def candidate(*ids: int, entropy: float = 0.5, ended: bool = False) -> Candidate:
    size = len(ids)
    return Candidate(ids, [-0.1] * size, [entropy] * size, (0.0,) * size, np.ones(size), [1] * size, ended)


def test_any_sequence_becomes_a_read_only_array_of_its_own():
    given = np.array([1.0, 2.0])
    made = Candidate([3, 4], (-0.5, -1.0), given, [0, 0], (1, 1), np.array([1, 2]), False)
    given[0] = 9.0
    assert made.entropies.tolist() == [1.0, 2.0]
    assert [getattr(made, name).dtype for name in COLUMNS] == [np.int32, *[np.float64] * 4, np.int32]
    for name in COLUMNS:
        with pytest.raises(ValueError, match="read-only"):
            getattr(made, name)[0] = 1


def test_measures_have_single_precision():
    made = candidate(1, entropy=0.1)
    assert made.entropies[0] == float(np.float32(0.1)) != 0.1


def test_equal_is_what_holds_the_same_numbers():
    assert candidate(1, 2) == candidate(1, 2)
    assert hash(candidate(1, 2)) == hash(candidate(1, 2))
    assert candidate(1, 2, entropy=math.nan) == candidate(1, 2, entropy=math.nan)
    others = [candidate(1), candidate(1, 3), candidate(1, 2, entropy=0.6), candidate(1, 2, ended=True)]
    assert all(candidate(1, 2) != other for other in others)
    assert all(candidate(1, 2) != dataclasses.replace(candidate(1, 2), **{name: (7, 8)}) for name in COLUMNS)
    assert candidate(1) != "1"


def test_a_pickled_candidate_is_the_same_and_still_read_only():
    back = pickle.loads(pickle.dumps(candidate(1, 2)))
    assert back == candidate(1, 2)
    assert not any(column.flags.writeable for column in back.columns())


def test_a_trajectorys_numbers_are_its_segments_in_order():
    segments = tuple(Segment(n, c, None) for n, c in enumerate([candidate(1, 2), candidate(3, entropy=2.0)]))
    trajectory = Trajectory(Prompt(Problem("p", ""), (5,)), 0, segments, (), "length")
    assert trajectory.ids.tolist() == [1, 2, 3]
    assert trajectory.entropies.tolist() == [0.5, 0.5, 2.0]
    assert trajectory.ids is trajectory.ids
    assert not trajectory.ids.flags.writeable
    empty = dataclasses.replace(trajectory, segments=())
    assert (empty.ids.tolist(), empty.ids.dtype, empty.logprobs.dtype) == ([], np.int32, np.float64)


def test_importing_the_types_imports_no_numpy():
    code = "import sys, e3rl.types; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
