"""`code`: a program in the response is run against the problem's tests, each in its own sandbox.

Expected results never enter the process that runs the program: outputs and values of calls are compared here.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from e3rl.environments.sandbox import Limits, SandboxUnavailable, run_program
from e3rl.errors import UserError
from e3rl.rewards.batch import Batch, BatchReward, Part
from e3rl.rewards.pool import PooledCall, ProcessPool

_FENCE = re.compile(r"```[ \t]*+(python3?|py|)[ \t]*+\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)
_SHARE = 0.8  # of the workers' time limit: a slow program is wrong, not missing
_TOLERANCE = 1e-6
MOST_TESTS = 200


@dataclass(frozen=True, slots=True)
class ProgramTest:
    """Standard input and the output expected for it, or a ``call`` and the ``repr`` of the value expected of it."""

    stdin: str = ""
    stdout: str | None = None
    call: str | None = None
    value: Any = None


def program_of(text: str) -> str:
    """The last fenced block of Python in a response; without any, the response itself."""
    blocks = [block for _, block in _FENCE.findall(text)]
    return blocks[-1] if blocks else text


def read_tests(given: Any) -> list[ProgramTest]:
    """Tests in the forms that data sets use; ValueError if one can't be read.

    A list (or its JSON) of ``{"input": …, "output": …}``, ``{"call": "f(2)", "value": 4}`` or ``"assert f(2) == 4"``; or one
    mapping ``{"inputs": […], "outputs": […]}``, with ``fn_name`` for calls, as in APPS and its relatives.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            given = [line for line in given.splitlines() if line.strip()]
    if isinstance(given, Mapping):
        given = _from_columns(given)
    if not isinstance(given, Sequence) or not given:
        raise ValueError("no tests: expected a list of them")
    if len(given) > MOST_TESTS:
        raise ValueError(f"{len(given)} tests; at most {MOST_TESTS} are run")
    return [_test(item) for item in given]


def _from_columns(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    inputs, outputs, name = given.get("inputs"), given.get("outputs"), given.get("fn_name")
    if not isinstance(inputs, Sequence) or not isinstance(outputs, Sequence) or len(inputs) != len(outputs):
        raise ValueError("'inputs' and 'outputs' have to be lists of one length")
    pairs = list(zip(inputs, outputs, strict=True))
    if name is None:
        return [{"input": i, "output": o} for i, o in pairs]
    if not str(name).isidentifier():
        raise ValueError(f"'fn_name' is {name!r}, no name of a function")
    return [{"call": f"{name}({', '.join(map(repr, i))})", "value": o} for i, o in pairs]


def _test(item: Any) -> ProgramTest:
    if isinstance(item, str):
        return _assertion(item)
    if isinstance(item, Mapping) and {"input", "output"} <= item.keys():
        return ProgramTest(stdin=_lines(item["input"]), stdout=_lines(item["output"]))
    if isinstance(item, Mapping) and {"call", "value"} <= item.keys():
        return ProgramTest(call=str(item["call"]), value=item["value"])
    raise ValueError(f"a test with neither input and output nor call and value: {str(item)[:80]}")


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _assertion(line: str) -> ProgramTest:
    """``assert CALL == LITERAL`` as a call and its value: the literal is not shown to the program."""
    try:
        [statement] = ast.parse(line.strip()).body
        assert isinstance(statement, ast.Assert)
        compared = statement.test
        if isinstance(compared, ast.Compare):
            assert len(compared.ops) == 1
            assert isinstance(compared.ops[0], ast.Eq | ast.Is)
            return ProgramTest(call=ast.unparse(compared.left), value=ast.literal_eval(compared.comparators[0]))
        if isinstance(compared, ast.UnaryOp) and isinstance(compared.op, ast.Not):
            return ProgramTest(call=f"bool({ast.unparse(compared.operand)})", value=False)
        return ProgramTest(call=f"bool({ast.unparse(compared)})", value=True)
    except (SyntaxError, ValueError, AssertionError):
        raise ValueError(f"can't be split into a call and its expected value: {line.strip()[:80]}") from None


def run_tests(program: str, tests: Any, seconds: float, memory: int) -> dict[str, Any]:
    """``{"passed", "total", "why"}``; it stops at the first test that fails. Raises ValueError for tests that can't be read."""
    wanted = read_tests(tests)
    left = seconds
    for number, test in enumerate(wanted):
        ran = run_program(
            program,
            stdin=test.stdin,
            calls=() if test.call is None else (test.call,),
            limits=Limits(max(0.05, left), memory),
        )
        left -= ran.seconds
        why = ran.failure or _difference(test, ran.stdout, ran.values)
        if why is not None:
            return {"passed": number, "total": len(wanted), "why": f"test {number + 1}: {why}"}
    return {"passed": len(wanted), "total": len(wanted), "why": None}


def _difference(test: ProgramTest, stdout: str, values: Sequence[str]) -> str | None:
    """The failure, if any."""
    if test.call is None:
        assert test.stdout is not None
        return None if _same_text(stdout, test.stdout) else "wrong output"
    if len(values) != 1:
        return "no value"
    try:
        value = ast.literal_eval(values[0])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return "a value that is no literal"
    return None if _same(value, test.value) else "wrong value"


def _same_text(got: str, wanted: str) -> bool:
    """Equal but for white space at the ends of lines and of the whole."""
    mine, theirs = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (got, wanted))
    return mine == theirs


def _same(got: Any, wanted: Any) -> bool:
    if isinstance(got, bool) or isinstance(wanted, bool):
        return got is wanted
    if isinstance(got, float) or isinstance(wanted, float):
        numbers = isinstance(got, int | float) and isinstance(wanted, int | float)
        try:
            return numbers and math.isclose(got, wanted, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
        except OverflowError:
            return False
    if isinstance(got, list | tuple) and isinstance(wanted, list | tuple):
        return len(got) == len(wanted) and all(map(_same, got, wanted))
    if isinstance(got, dict) and isinstance(wanted, dict):
        return got.keys() == wanted.keys() and all(_same(got[k], wanted[k]) for k in got)
    return type(got) is type(wanted) and bool(got == wanted)


class CodeReward(BatchReward):
    """1 if the response's program passes all of the problem's ``tests``, else 0. Missing if the tests can't be run.

    The tests are in the column ``tests``, or in the answer (`read_tests`). Each test has its own process; all tests of a
    response share the time limit.
    """

    memory = 512 * 2**20

    def __init__(self, pool: ProcessPool) -> None:
        super().__init__(pool)
        run_program("")  # raises here if programs can't be confined

    def score(self, batch: Batch) -> list[Part]:
        tasks, places, parts = [], [], [Part()] * len(batch)
        for place, (problem, text) in enumerate(zip(batch.problems, batch.texts, strict=True)):
            tests = problem.columns.get("tests", problem.answer)
            if tests is None:
                parts[place] = Part(error="the problem has no tests (a column 'tests', or data.answer_column)")
                continue
            given = {
                "program": program_of(text),
                "tests": tests,
                "seconds": _SHARE * self.pool.timeout,
                "memory": self.memory,
            }
            tasks.append(PooledCall(f"{__name__}:checked_tests", given))
            places.append(place)
        for place, outcome in zip(places, self.pool.map(tasks), strict=True):
            parts[place] = _part(outcome.value, outcome.error)
        return parts


def checked_tests(**given: Any) -> dict[str, Any]:
    """`run_tests` in a worker; unreadable tests raise UserError."""
    try:
        return run_tests(**given)
    except SandboxUnavailable:
        raise
    except ValueError as error:
        raise UserError(f"the problem's tests: {error}") from None


def _part(value: Any, error: str | None) -> Part:
    if error is not None:
        return Part(error=error)
    return Part(float(value["passed"] == value["total"]), details={"passed": value["passed"] / value["total"]})
