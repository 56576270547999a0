"""Environments in processes of their own: the same rollouts, and accidents that cost one trajectory its reward."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from e3rl.errors import UserError
from e3rl.rewards.scorer import Scorer
from e3rl.types import Draw, Problem, Reward, Trajectory
from tests.environments.hostile import ACCIDENTS
from tests.environments.worlds import CALL, COUNTER, STATEFUL, add, answers, roll, world

ACCIDENT = (
    COUNTER
    + '''
    def accident(self, code: str) -> str:
        """Have one.

        Args:
            code: which
        """
        scope = {}
        exec("def run():\\n    " + code, scope)
        return str(scope["run"]())
'''
)


def hosts_left() -> set[int]:
    """Processes of environments and what they have forked: those of this module that are no child of this process, nor come
    from a test that runs beside this one."""
    gc.collect()
    found, worker = set(), os.environ.get("PYTEST_XDIST_WORKER", "")
    runs = f"PYTEST_XDIST_TESTRUNUID={os.environ.get('PYTEST_XDIST_TESTRUNUID')}".encode()
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if b"e3rl.environments.isolated" not in (place / "cmdline").read_bytes() or parent == os.getpid():
                continue
            told = (place / "environ").read_bytes().split(b"\0")
            if not worker or (runs in told and f"PYTEST_XDIST_WORKER={worker}".encode() in told):
                found.add(int(place.name))
    return found


@pytest.mark.parametrize(("source", "state"), [(STATEFUL, "snapshot"), (COUNTER, "deepcopy")])
def test_a_process_of_its_own_changes_no_token(tmp_path: Path, source: str, state: str) -> None:
    def says(context: str, draw: Draw) -> str:
        if context.count("<tool_response>") == 2:
            return "Done."
        return (
            (add(10) if draw.attempt == 0 else add(2)) if "<tool_response>" not in context else CALL.format("ask", "{}")
        )

    found: list[Trajectory] = []
    values: list[float | None] = []
    for isolate in (False, True):
        config = world(tmp_path, source, erase="errors", state=state, isolate=isolate)
        found += roll(config, says)[0]
        with Scorer(config.rewards) as scorer:
            values += [r.value for r in scorer.score(found[-1:], [""])]
    assert values == [5.0, 5.0]
    assert (found[0].segments, found[0].erasures) == (found[1].segments, found[1].erasures)
    assert len(found[1].erasures) == 1


def accident(tmp_path: Path, name: str, timeout: float) -> tuple[dict[str, Reward], float]:
    """The rewards of a trajectory whose tool has an accident and of one beside it, and the seconds that both took."""
    config = world(tmp_path, ACCIDENT, timeout=timeout, isolate=True)
    problems = [Problem(text, text, columns={"start": 3}) for text in ("bad", "good")]

    def says(context: str, draw: Draw) -> str:
        if "<tool_response>" in context:
            return "Done."
        return CALL.format("accident", json.dumps({"code": ACCIDENTS[name]})) if draw.prompt_id == "bad" else add(1)

    began = time.monotonic()
    trajectories: Any = roll(config, says, *problems)[0]
    seconds = time.monotonic() - began
    with Scorer(config.rewards) as scorer:
        rewards = scorer.score(trajectories, ["", ""])
    return {t.prompt.problem.id: r for t, r in zip(trajectories, rewards, strict=True)}, seconds


@pytest.mark.parametrize("name", [name for name in ACCIDENTS if name != "sleeps"])
def test_an_accident_costs_one_trajectory(tmp_path: Path, name: str) -> None:
    before = hosts_left()
    rewards, seconds = accident(tmp_path, name, 3.0)
    assert (rewards["good"].value, rewards["bad"].value) == (4.0, None)
    assert "its environment" in str(rewards["bad"].error)
    assert seconds < 12
    assert hosts_left() <= before


def test_no_process_outlives_its_trajectory(tmp_path: Path) -> None:
    config = world(tmp_path, ACCIDENT, isolate=True)
    before = hosts_left()
    fork = json.dumps({"code": "import os, time; os.fork() or time.sleep(60)"})
    found = roll(config, answers(CALL.format("accident", fork), "Done."))
    assert len(hosts_left() - before) == 2
    del found
    assert hosts_left() <= before


@pytest.mark.parametrize("how", ["time.sleep(20)", "os._exit(0)"])
def test_a_get_reward_that_hangs_or_dies_is_missing_whatever_others_give(tmp_path: Path, how: str) -> None:
    source = COUNTER.replace(
        "def get_reward(self) -> float:",
        f"def get_reward(self) -> float:\n        import os, time\n        if self.count == 4: {how}",
    )
    config = world(tmp_path, source, timeout=1.5, isolate=True)
    problems = [Problem(str(by), "Count.", columns={"start": 3}) for by in (1, 2)]

    def says(context: str, draw: Draw) -> str:
        return "Done." if "<tool_response>" in context else add(int(draw.prompt_id))

    trajectories = roll(config, says, *problems)[0]
    with Scorer(replace(config.rewards, functions=("environment", "format"))) as scorer:
        found = scorer.score(trajectories, ["", ""])
    rewards = {t.prompt.problem.id: r for t, r in zip(trajectories, found, strict=True)}
    assert (rewards["2"].value, rewards["1"].value) == (5.0, None)
    why = "took longer than 1.5 s" if "sleep" in how else "ended its process"
    assert str(rewards["1"].error).startswith(f"environment: raised HostLost: {why}")


def test_what_is_wrong_is_said_from_there_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="doesn't bring back"):
        roll(
            world(tmp_path, STATEFUL.replace("self.count = snapshot", "pass"), erase="errors", isolate=True),
            answers("3"),
        )
    with pytest.raises(UserError, match=r"reset\(\) returned int"):
        roll(world(tmp_path, COUNTER.replace('return f" It', 'return 3 or f" It'), isolate=True), answers("3"))
    broken = COUNTER.replace("self.count, self.asleep", "int('no number')\n        self.count, self.asleep")
    with pytest.raises(UserError, match=r"reset\(\) fails on problem 'p': ValueError: .*no number"):
        roll(world(tmp_path, broken, isolate=True), answers("3"))
