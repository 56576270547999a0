"""`code`: which program is run, what tests say, what is 0 and what is missing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from e3rl.config import RewardsConfig
from e3rl.environments.code import ProgramTest, program_of, read_tests, run_tests
from e3rl.rewards.scorer import Scorer
from e3rl.types import Problem, Prompt, Trajectory
from tests.rewards.build import trajectory

MEMORY = 512 * 2**20


def _of(problem: Problem) -> Trajectory:
    return replace(trajectory(), prompt=Prompt(problem, (1,)))


def test_the_last_fenced_program_counts():
    text = "First:\n```python\nx = 1\n```\nBetter:\n```python\nx = 2\n```\nDone."
    assert program_of(text) == "x = 2"
    assert program_of("```\nprint(3)\n```") == "print(3)"
    assert program_of("```python\nprint(4)") == "print(4)"
    assert program_of("print(5)") == "print(5)"


def test_tests_of_several_forms():
    assert read_tests('[{"input": "1\\n", "output": "2\\n"}]') == [ProgramTest(stdin="1\n", stdout="2\n")]
    assert read_tests(["assert f(2, 'a') == [1, 2]"]) == [ProgramTest(call="f(2, 'a')", value=[1, 2])]
    assert read_tests("assert f(1)\nassert not f(2)") == [
        ProgramTest(call="bool(f(1))", value=True),
        ProgramTest(call="bool(f(2))", value=False),
    ]
    assert read_tests({"inputs": [[1, "b"]], "outputs": [3], "fn_name": "g"}) == [
        ProgramTest(call="g(1, 'b')", value=3)
    ]
    assert read_tests({"inputs": [["a", "b"]], "outputs": ["c"]}) == [ProgramTest(stdin="a\nb", stdout="c")]


@pytest.mark.parametrize(
    ("tests", "why"),
    [
        ([], "no tests"),
        (["assert f(1) == g(1)"], "can't be split into a call"),
        (["import os"], "can't be split into a call"),
        ([{"input": "1"}], "neither input and output"),
        ({"inputs": [1], "outputs": []}, "one length"),
        ({"inputs": [[1]], "outputs": [1], "fn_name": "os.system"}, "no name of a function"),
        ([{"input": "", "output": ""}] * 201, "201 tests"),
    ],
)
def test_tests_that_cannot_be_run_are_refused(tests: Any, why: str):
    with pytest.raises(ValueError, match=why):
        read_tests(tests)


@pytest.mark.parametrize(
    ("program", "value", "passed"),
    [
        ("def f(): return [1, 2]", (1, 2), 1),
        ("def f(): return 0.1 + 0.2", 0.3, 1),
        ("def f(): return 0.31", 0.3, 0),
        ("def f(): return True", 1, 0),
        ("def f(): return 1", True, 0),
        ("def f(): return '1'", 1, 0),
        ("def f(): return {'a': [1.0]}", {"a": [1]}, 1),
        ("def f(): return {'a': 1, 'b': 2}", {"a": 1}, 0),
        ("def f(): return {3, 4}", {4, 3}, 1),
        ("def f(): return 10**400", 0.5, 0),
        ("def f(): return object()", None, 0),
        ("def f(): return None", None, 1),
    ],
)
def test_values_are_compared_by_kind_and_value(program: str, value: Any, passed: int):
    assert run_tests(program, [{"call": "f()", "value": value}], 3, MEMORY)["passed"] == passed


def test_output_is_compared_but_for_white_space_at_ends():
    tests = [{"input": "3", "output": "3 \n4\n\n"}]
    assert run_tests("n = int(input())\nprint(n)\nprint(n + 1, '')", tests, 3, MEMORY)["passed"] == 1
    assert run_tests("n = int(input())\nprint(n, n + 1)", tests, 3, MEMORY)["why"] == "test 1: wrong output"


def test_all_tests_share_the_time_and_the_first_failure_ends_it():
    tests = [{"call": f"f({n})", "value": n} for n in range(20)]
    found = run_tests("import time\ndef f(x):\n    time.sleep(0.1)\n    return x", tests, 0.5, MEMORY)
    assert 1 <= found["passed"] <= 5
    assert "took too long" in found["why"]
    assert run_tests("def f(x): return x % 3", tests, 3, MEMORY) == {
        "passed": 3,
        "total": 20,
        "why": "test 4: wrong value",
    }


def test_a_wrong_or_slow_program_is_0_and_tests_that_cannot_be_run_are_missing():
    tests = ["assert f(2) == 3"]
    problems = [Problem(str(n), "?", columns={"tests": t}) for n, t in enumerate([tests, tests, tests, ["x"], None])]
    problems.append(Problem("by answer", "?", answer="assert f(2) == 3"))
    texts = ["def f(x): return x + 1", "def f(x): return x", "while True: pass", "", "", "def f(x): return 3"]
    with Scorer(RewardsConfig(functions=("code",), timeout=4.0, workers=2)) as scorer:
        rewards = scorer.score([_of(p) for p in problems], texts)
    assert [r.value for r in rewards] == [1, 0, 0, None, None, 1]
    assert rewards[0].parts == {"code": 1.0, "code/passed": 1.0}
    assert "can't be split into a call" in str(rewards[3].error)
    assert "no tests" in str(rewards[4].error)
