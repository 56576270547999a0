"""Turns that are erased after their results: what a bad call did is taken back with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from e3rl.types import Draw
from tests.environments.worlds import COUNTER, STATEFUL, add, answers, roll, world


@pytest.mark.parametrize(("source", "state"), [(STATEFUL, "snapshot"), (COUNTER, "deepcopy")])
def test_a_bad_call_is_taken_back_with_the_state(tmp_path: Path, source: str, state: str) -> None:
    config = world(tmp_path, source, erase="errors", state=state)

    def says(context: str, draw: Draw) -> str:
        return (add(10) if draw.attempt == 0 else add(2)) if "<tool_response>" not in context else "Done."

    [trajectory], tokens, _ = roll(config, says)
    [erasure] = trajectory.erasures
    assert tokens.decode(erasure.candidate.ids.tolist()) == f"{add(10)}<|im_end|>"
    assert erasure.observation is not None
    assert erasure.observation.calls[0].result == "{'error': 'too many'}"
    assert "too many" not in tokens.decode(trajectory.ids.tolist())
    assert trajectory.environment.count == 5


def test_without_a_way_back_the_bad_call_stays(tmp_path: Path) -> None:
    [trajectory], _, _ = roll(world(tmp_path, erase="errors"), answers(add(10), "Done."))
    assert (trajectory.erasures, trajectory.environment.count) == ((), -1)
    observation = trajectory.segments[-2].observation
    assert observation is not None
    assert observation.forced


def test_a_judge_of_ones_own_sees_the_results(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("def odd(calls):\n    return float(int(calls[0].result) % 2)\n")
    config = world(tmp_path, STATEFUL, erase=f"{tmp_path}/judge.py:odd", max_turn_erasures=2)

    def says(context: str, draw: Draw) -> str:
        return add(4 if draw.attempt == 0 else 3) if "<tool_response>" not in context else "Done."

    [trajectory], _, _ = roll(config, says)
    results = [e.observation.calls[0].result for e in trajectory.erasures if e.observation is not None]
    assert (results, trajectory.environment.count) == (["7"], 6)
