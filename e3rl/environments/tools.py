"""Environments as users write them for TRL: a class with ``reset`` whose public methods are tools."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from e3rl.config import EnvironmentsConfig
from e3rl.errors import UserError
from e3rl.plugins import load
from e3rl.types import Problem, ToolResult

ENVIRONMENTS = {
    "calculator": "e3rl.environments.builtin:Calculator",
    "python": "e3rl.environments.builtin:PythonTool",
    "files": "e3rl.environments.builtin:Files",
}
_RESERVED = ("reset", "get_reward", "snapshot", "restore")
_TOY = {"integer": 1, "number": 1.0, "string": "x", "boolean": True, "array": [], "object": {}}
_EMPTY = ("", "None", "[]", "{}", "()")


def make(config: EnvironmentsConfig) -> Callable[[], Any]:
    """The factory that a config names."""
    factory = load("environment", config.factory, ENVIRONMENTS)
    if not callable(factory):
        raise UserError(f"environments.factory = '{config.factory}' is {type(factory).__name__}, nothing to call")
    return factory  # type: ignore[no-any-return]


def create(factory: Callable[[], Any], name: str) -> Any:
    """An environment. UserError where the factory takes arguments, or makes what has no ``reset``."""
    try:
        inspect.signature(factory).bind()
    except ValueError:  # one that can't be inspected
        pass
    except TypeError as error:
        raise UserError(f"environment '{name}': it is made without arguments, and {error}") from None
    made = factory()
    if not callable(getattr(made, "reset", None)):
        raise UserError(f"environment '{name}': {type(made).__name__} has no reset(**row)")
    return made


def tools_of(environment: Any) -> dict[str, Callable[..., Any]]:
    """The public methods of its class, but for those that the protocol names."""
    names = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
    return {name: getattr(environment, name) for name in names if not name.startswith("_") and name not in _RESERVED}


def schemas_of(environment: Any, name: str) -> list[dict[str, Any]]:
    """OpenAI's tool objects, from type hints and docstrings; UserError where a tool lacks one."""
    from transformers.utils import get_json_schema

    found = []
    for tool, method in tools_of(environment).items():
        try:
            schema = get_json_schema(method)
            json.dumps(schema, allow_nan=False)
        except Exception as error:  # of docstring, hints, or values that are no JSON
            raise UserError(
                f"environment '{name}': tool {tool}() needs a type hint and a line in a Google-style docstring ('Args:') for "
                f"every argument: {error}"
            ) from None
        found.append(schema)
    if not found:
        raise UserError(f"environment '{name}': {type(environment).__name__} has no public method, so no tool")
    return found


def row_of(problem: Problem) -> dict[str, Any]:
    """What ``reset`` is called with: the row's columns, its prompt, answer and id among them."""
    prompt: Any = problem.prompt
    if not isinstance(prompt, str):
        prompt = [{"role": m.role, "content": m.content} for m in prompt]
    return {**problem.columns, "id": problem.id, "prompt": prompt, "answer": problem.answer}


def reset(environment: Any, problem: Problem, name: str) -> str:
    """What the environment says first, to be added to the last user message."""
    takes = inspect.signature(environment.reset).parameters
    row = row_of(problem)
    if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        row = {key: value for key, value in row.items() if key in takes}
    said = environment.reset(**row)
    if said is None or isinstance(said, str):
        return said or ""
    raise UserError(f"environment '{name}': reset() returned {type(said).__name__}, not a text or None")


def call(tool: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """What a tool returns, plain or asynchronous."""
    found = tool(**arguments)
    return asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found


async def _awaited(found: Any) -> Any:
    return await found


def can_go_back(environment: Any, config: EnvironmentsConfig) -> bool:
    """Whether a turn can be taken back after its calls."""
    return config.state == "deepcopy" or (hasattr(environment, "snapshot") and hasattr(environment, "restore"))


def check_restore(environment: Any, schemas: list[dict[str, Any]], config: EnvironmentsConfig) -> None:
    """UserError where ``restore`` doesn't: tried once on a toy call of every tool."""
    if config.erase == "none" or config.state == "deepcopy" or not can_go_back(environment, config):
        return
    before = copy.deepcopy(environment.snapshot())
    held = environment.snapshot()
    for schema in schemas:
        function = schema["function"]
        properties: Mapping[str, Any] = function["parameters"].get("properties", {})
        toy = {key: _TOY.get(str(value.get("type"))) for key, value in properties.items()}
        try:
            call(getattr(environment, function["name"]), toy)
        except Exception:
            continue  # a toy call may well be refused
    environment.restore(held)
    if environment.snapshot() != before:
        raise UserError(
            f"environment '{config.factory}': after restore(snapshot()) its snapshot is another one: restore() doesn't bring "
            "back what a call changed, or snapshot() hands out what calls go on to change"
        )


def evidence_of(config: EnvironmentsConfig) -> Callable[[tuple[ToolResult, ...]], float] | None:
    """The function that says what results have against a turn; None: nothing is asked."""
    if config.erase == "none":
        return None
    if config.erase == "errors":
        return lambda calls: float(any(call.failed for call in calls))
    if config.erase == "empty":
        return lambda calls: float(any(call.failed or call.result.strip() in _EMPTY for call in calls))
    return load("judge of turns", config.erase, {"none": "", "errors": "", "empty": ""})  # type: ignore[no-any-return]
