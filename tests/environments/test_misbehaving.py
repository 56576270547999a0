"""Tools that hang, raise, or change the process that they run in: each costs its own trajectory the reward, and no other."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from e3rl.rewards.scorer import Scorer
from e3rl.types import Draw, Problem
from tests.environments.worlds import CALL, COUNTER, STATEFUL, add, answers, roll, world


def test_a_tool_that_hangs_costs_one_trajectory_its_reward(tmp_path: Path) -> None:
    config = world(tmp_path, timeout=1.0)
    problems = [Problem(name, name, columns={"start": 3}) for name in ("hang", "go")]

    def says(context: str, draw: Draw) -> str:
        if "<tool_response>" in context:
            return "Done."
        return CALL.format("rest", '{"seconds": 20.0}') if draw.prompt_id == "hang" else add(1)

    began = time.monotonic()
    trajectories, _, _ = roll(config, says, *problems)
    assert time.monotonic() - began < 15
    with Scorer(config.rewards) as scorer:
        rewards = scorer.score(trajectories, ["", ""])
    by_name = dict(zip([t.prompt.problem.id for t in trajectories], rewards, strict=True))
    assert (by_name["go"].value, by_name["hang"].value) == (4.0, None)
    assert by_name["hang"].error == "its environment took longer than 1 s"


@pytest.mark.parametrize("isolate", [False, True], ids=["here", "isolated"])
def test_each_call_of_a_turn_has_the_deadline_for_itself(tmp_path: Path, isolate: bool) -> None:
    source = (
        COUNTER
        + """
    async def doze(self, seconds: float) -> str:
        \"\"\"Wait.

        Args:
            seconds: how long
        \"\"\"
        import asyncio
        await asyncio.sleep(seconds)
"""
    )
    config = world(tmp_path, source, timeout=1.0, isolate=isolate)
    turns = {
        "three": [("rest", 0.4), ("doze", 0.4), ("rest", 0.4)],
        "hangs": [("rest", 0.1), ("rest", 1.5)],
        "hangs, asynchronous": [("doze", 0.1), ("doze", 1.5)],
    }

    def says(context: str, draw: Draw) -> str:
        calls = [CALL.format(name, json.dumps({"seconds": s})) for name, s in turns[draw.prompt_id]]
        return "Done." if "<tool_response>" in context else "".join([*calls, add(1)])

    found, _, _ = roll(config, says, *[Problem(name, name, columns={"start": 3}) for name in turns])
    with Scorer(config.rewards) as scorer:
        rewards = scorer.score(found, [""] * 3)
    seen = {t.prompt.problem.id: (r.value, r.error) for t, r in zip(found, rewards, strict=True)}
    late = (None, "its environment took longer than 1 s")
    assert seen == {"three": (4.0, None), "hangs": late, "hangs, asynchronous": late}
    if not isolate:
        counts = {t.prompt.problem.id: t.environment.count for t in found if t.environment}
        assert counts == {"three": 4, "hangs": 3, "hangs, asynchronous": 3}, "after a late call none is begun"


def test_each_toy_call_before_the_run_has_the_deadline_for_itself(tmp_path: Path) -> None:
    slow = STATEFUL.replace("time.sleep(seconds)", "time.sleep(0.6)").replace(
        "        return str(self.count)\n", "        import time; time.sleep(0.6)\n        return str(self.count)\n"
    )
    [trajectory], _, _ = roll(world(tmp_path, slow, erase="errors", timeout=1.0), answers("Done."))
    assert trajectory.failure is None


@pytest.mark.parametrize("isolate", [False, True], ids=["here", "isolated"])
def test_get_reward_may_be_asynchronous_and_fails_alone(tmp_path: Path, isolate: bool) -> None:
    source = COUNTER.replace(
        "    def get_reward(self) -> float:\n",
        "    async def get_reward(self) -> float:\n        1 / (self.count - 4)\n",
    )
    config = world(tmp_path, source, isolate=isolate)
    problems = [Problem(str(by), "Count.", columns={"start": 3}) for by in (1, 2)]
    trajectories, _, _ = roll(
        config, lambda context, draw: "Done." if "<tool_response>" in context else add(int(draw.prompt_id)), *problems
    )
    with Scorer(config.rewards) as scorer:
        rewards = scorer.score(trajectories, ["", ""])
    by_name = dict(zip([t.prompt.problem.id for t in trajectories], rewards, strict=True))
    assert (by_name["1"].value, by_name["2"].value) == (None, 5.0)
    assert "division by zero" in str(by_name["1"].error)


def test_a_tool_that_changes_the_directory_costs_its_own_reward(tmp_path: Path) -> None:
    source = (
        COUNTER
        + f"""
    def move(self) -> str:
        \"\"\"Go elsewhere.\"\"\"
        import os
        os.chdir({str(tmp_path)!r})
        return "moved"
"""
    )
    config, place = world(tmp_path, source), Path.cwd()
    [trajectory], _, _ = roll(config, answers(CALL.format("move", "{}"), "Done."))
    assert Path.cwd() == place
    with Scorer(config.rewards) as scorer:
        [reward] = scorer.score([trajectory], [""])
    assert reward.value is None
    assert reward.error == f"its environment changed the working directory to {tmp_path}; it was changed back"


def test_what_a_tool_changes_in_the_process_is_put_back_or_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        COUNTER
        + """
    def meddle(self) -> str:
        \"\"\"Change what others share.\"\"\"
        import os
        os.umask(0o077)
        os.environ["CHANGED_BY_A_TOOL"] = "secret"
        return "done"
"""
    )
    monkeypatch.setattr(os, "environ", os.environ.copy())
    umask = os.umask(0o022)
    try:
        [trajectory], _, _ = roll(world(tmp_path, source), answers(CALL.format("meddle", "{}"), "Done."))
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(umask)
    assert trajectory.failure is None
    said = capsys.readouterr().err
    assert "the umask changed; put back" in said
    assert "CHANGED_BY_A_TOOL changed; that stays" in said
    assert "secret" not in said
