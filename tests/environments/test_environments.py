# ruff: noqa: E501
"""Environments written for TRL, from the class to the trajectory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from e3rl.environments.episodes import Toolbox
from e3rl.errors import UserError
from e3rl.rewards.scorer import Scorer
from e3rl.types import Draw, Message, Problem
from tests.environments.worlds import CALL, STATEFUL, add, answers, roll, world


def test_a_class_written_for_trl_runs_unchanged(tmp_path: Path) -> None:
    config = world(tmp_path)
    [trajectory], tokens, engine = roll(config, answers(f"Let me see. {add(2)}", add(4), "It stands at 9."))
    prompt = tokens.decode(list(trajectory.prompt.ids))
    assert prompt.endswith("Count. It stands at 3.<|im_end|>\n<|im_start|>assistant\n")
    assert '"name": "add", "description": "Count on."' in prompt
    assert '"ask"' in prompt
    assert '"get_reward"' not in prompt
    assert '"reset"' not in prompt
    assert tokens.decode(trajectory.ids.tolist()) == (
        f"Let me see. {add(2)}<|im_end|>\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        f"{add(4)}<|im_end|>\n<|im_start|>user\n<tool_response>\n9\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "It stands at 9.<|im_end|>"
    )
    drawn = trajectory.ids[trajectory.drawn_T].tolist()
    assert tokens.decode(drawn) == f"Let me see. {add(2)}<|im_end|>{add(4)}<|im_end|>It stands at 9.<|im_end|>"
    assert engine.prefills == 1, "observations are appended to the row"
    results = [c for s in trajectory.segments if s.observation for c in s.observation.calls]
    assert [(c.name, json.loads(c.arguments), c.result) for c in results] == [
        ("add", {"by": 2}, "5"),
        ("add", {"by": 4}, "9"),
    ]
    with Scorer(config.rewards) as scorer:
        [reward] = scorer.score([trajectory], [""])
    assert (reward.value, reward.parts) == (9.0, {"environment": 9.0})


SEVERAL = (
    STATEFUL.replace("self, start: int = 0, **row", "self, start, id, prompt, answer")
    + """

class Silent:
    def reset(self, **row):
        self.row = sorted(row)

    def look(self) -> str:
        \"\"\"What the row holds.\"\"\"
        return ", ".join(self.row)

ALL = {"counting": Counter, "silent": Silent}
"""
)


@pytest.mark.parametrize("isolate", [False, True], ids=["here", "isolated"])
def test_a_row_names_its_environment_and_sees_only_its_tools(tmp_path: Path, isolate: bool) -> None:
    config = world(tmp_path, SEVERAL, several="ALL", erase="errors", isolate=isolate)
    rows = [
        Problem(f"p{n}", "?", columns={"start": n, "environment": kind})
        for n, kind in enumerate(["silent", "counting", "silent"])
    ]

    def says(context: str, draw: Draw) -> str:
        called = CALL.format("look", "{}") if '"look"' in context else add(10 if draw.attempt == 0 else 4)
        return "Done." if "<tool_response>" in context else called

    found, tokens, _ = roll(config, says, *rows)
    seen = {t.prompt.problem.id: t for t in found}
    shown = {name: tokens.decode(list(t.prompt.ids)) for name, t in seen.items()}
    assert [('"look"' in shown[p.id], '"add"' in shown[p.id]) for p in rows] == [
        (True, False),
        (False, True),
        (True, False),
    ]
    results = {
        name: [c.result for s in t.segments if s.observation for c in s.observation.calls] for name, t in seen.items()
    }
    assert results == {"p0": ["answer, id, prompt, start"], "p1": ["5"], "p2": ["answer, id, prompt, start"]}
    assert [len(seen[p.id].erasures) for p in rows] == [0, 1, 0], "Silent has no way back, Counter has one"
    with pytest.raises(
        UserError, match=r"problem 'q': its column 'environment' is 'other', and .* has counting, silent"
    ):
        roll(config, says, Problem("q", "?", columns={"environment": "other"}))
    with pytest.raises(UserError, match="names several environments, and here one is needed"):
        Toolbox(config.environments, tokens, {})


def test_what_goes_wrong_is_what_the_model_sees(tmp_path: Path) -> None:
    turns = answers(
        add(10) + add(1) + CALL.format("ask", "{}"),
        CALL.format("fly", "{}") + CALL.format("add", '{"to": 1}'),
        "<tool_call>\nnot json\n</tool_call>",
    )
    [trajectory], _, _ = roll(world(tmp_path), turns)
    first, second = [s.observation for s in trajectory.segments if s.observation]
    assert [(c.result, c.failed) for c in first.calls] == [("{'error': 'too many'}", True), ("0", False), ("0", False)]
    assert next(c.result for c in second.calls) == "{'error': 'Tool fly not found.'}"
    assert "unexpected keyword argument 'to'" in second.calls[1].result
    assert (trajectory.finish, trajectory.turns) == ("stop", 3)


def test_turns_and_calls_have_limits(tmp_path: Path) -> None:
    [trajectory], _, _ = roll(world(tmp_path, max_turns=2, max_calls=1), lambda context, draw: add(1) + add(1))
    seen = [s.observation for s in trajectory.segments if s.observation]
    assert (len(seen), trajectory.finish, trajectory.environment.count) == (2, "length", 5)
    assert seen[0].calls[1].result == "{'error': 'At most 1 calls a turn.'}"


def test_a_chat_prompt_keeps_its_messages(tmp_path: Path) -> None:
    prompt = (Message("system", "Be brief."), Message("user", "Count."))
    [trajectory], tokens, _ = roll(world(tmp_path), answers("3"), Problem("p", prompt, columns={"start": 3}))
    assert "Be brief." in tokens.decode(list(trajectory.prompt.ids))
    assert trajectory.prompt.problem.prompt == prompt
