"""Environments as users write them for TRL: a class with ``reset`` whose public methods are tools."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from e3rl.config import EnvironmentsConfig
from e3rl.errors import UserError
from e3rl.plugins import load
from e3rl.types import Problem, ToolResult

ENVIRONMENTS = {
    "calculator": "e3rl.environments.builtin:Calculator",
    "python": "e3rl.environments.builtin:PythonTool",
    "files": "e3rl.environments.builtin:Files",
    "books": "e3rl.lab.books:Books",
}
_RESERVED = ("reset", "get_reward", "snapshot", "restore")
_TOY = {"integer": 1, "number": 1.0, "string": "x", "boolean": True, "array": [], "object": {}}
_EMPTY = ("", "None", "[]", "{}", "()")


def kinds_of(name: str) -> list[str]:
    """The names of several environments, if that is what ``environments.factory`` is; a row's column says which is its own."""
    found = load("environment", name, ENVIRONMENTS)
    return [str(kind) for kind in found] if isinstance(found, Mapping) else []


def make(name: str, kind: str = "") -> Callable[[], Any]:
    """The factory of this name. ``kind``: which one of several."""
    found = load("environment", name, ENVIRONMENTS)
    if isinstance(found, Mapping) and not kind:
        raise UserError(f"environments.factory = '{name}' names several environments, and here one is needed")
    factory = found[kind] if kind else found
    if not callable(factory):
        raise UserError(f"environments.factory = '{name}' is {type(factory).__name__}, nothing to call")
    return factory  # type: ignore[no-any-return]


def create(factory: Callable[[], Any], name: str) -> Any:
    """An environment. UserError if the factory takes arguments, or its environment has no ``reset``."""
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
    """The public methods of its class, except those of the protocol."""
    names = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
    return {name: getattr(environment, name) for name in names if not name.startswith("_") and name not in _RESERVED}


def schemas_of(environment: Any, name: str) -> list[dict[str, Any]]:
    """OpenAI's tool objects, from type hints and docstrings; UserError if a tool lacks one."""
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
    """The arguments of ``reset``: the row's columns, including its prompt, answer and id."""
    prompt: Any = problem.prompt
    if not isinstance(prompt, str):
        prompt = [{"role": m.role, "content": m.content} for m in prompt]
    return {**problem.columns, "id": problem.id, "prompt": prompt, "answer": problem.answer}


def reset(environment: Any, row: dict[str, Any], name: str) -> str:
    """The environment's first text, which is added to the last user message."""
    takes = inspect.signature(environment.reset).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        row = {key: value for key, value in row.items() if key in takes}
    said = environment.reset(**row)
    if isinstance(said, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in said):
        return "".join(str(part.get("text", "")) for part in said)
    if said is None or isinstance(said, str):
        return said or ""
    raise UserError(f"environment '{name}': reset() returned {type(said).__name__}, not a text or None")


def call(tool: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """The result of a method, sync or async."""
    found = tool(**arguments)
    return asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found


async def _awaited(found: Any) -> Any:
    return await found


def can_go_back(environment: Any, config: EnvironmentsConfig) -> bool:
    """Whether a turn can be undone after its calls."""
    return config.state == "deepcopy" or (hasattr(environment, "snapshot") and hasattr(environment, "restore"))


class Host:
    """An environment and the operations on it; `e3rl.environments.isolation.IsolatedHost` runs one in a child process.

    Nothing here has a time limit: the caller uses a thread and stops waiting for it.
    """

    def __init__(self, factory: Callable[[], Any], name: str, *, deep: bool) -> None:
        self.instance = create(factory, name)
        self._name, self._deep = name, deep
        self._kept: Any = None
        self._marked: Any = None

    def reset(self, row: dict[str, Any]) -> str:
        """The environment's first text."""
        return reset(self.instance, row, self._name)

    def call(self, tool: str, arguments: str) -> str:
        """The result of a tool, as text."""
        found = tools_of(self.instance).get(tool)
        if found is None:
            raise ValueError(f"Tool {tool} not found.")
        return str(call(found, json.loads(arguments)))

    def save(self) -> None:
        """Save the current state."""
        self._kept = copy.deepcopy(self.instance) if self._deep else self.instance.snapshot()

    def go_back(self) -> None:
        """Restore the last saved state."""
        if self._deep:
            self.instance = self._kept
        else:
            self.instance.restore(self._kept)

    def mark(self) -> None:
        """Save a state that `compare` goes back to; UserError if that fails."""
        try:
            self.save()
            self._marked = copy.deepcopy(self._kept)
        except Exception as error:
            how = "can't be copied (environments.state = 'deepcopy')" if self._deep else "has a snapshot() that fails"
            raise UserError(f"environment '{self._name}' {how}: {type(error).__name__}: {error}") from None

    def compare(self) -> None:
        """Go back to the state that `mark` saved; UserError if its snapshot is another one then."""
        try:
            self.go_back()
            after = self.instance.snapshot()
        except Exception as error:
            raise UserError(
                f"environment '{self._name}': restore(snapshot()) fails after a call: {type(error).__name__}: {error}"
            ) from None
        if after != self._marked:
            raise UserError(
                f"environment '{self._name}': after restore(snapshot()) its snapshot is another one: restore() doesn't bring "
                "back what a call changed, or snapshot() returns an object that later calls change"
            )

    def reward(self) -> Any:
        """The result of ``get_reward``; None without one."""
        return call(self.instance.get_reward, {}) if hasattr(self.instance, "get_reward") else None

    def close(self) -> None:
        """Nothing is held."""


def toy_calls(schemas: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """A call of every tool: its name, and plain arguments of the right types as JSON."""
    for function in (schema["function"] for schema in schemas):
        properties: Mapping[str, Any] = function["parameters"].get("properties", {})
        yield function["name"], json.dumps({key: _TOY.get(str(value.get("type"))) for key, value in properties.items()})


def within(seconds: float, work: Callable[[], Any], what: str) -> Any:
    """The result of ``work``; UserError if ``what`` it is takes longer. A thread that hangs is abandoned."""
    found: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            found.put((work(), None))
        except BaseException as error:  # user code may raise anything
            found.put((None, error))

    threading.Thread(target=run, name="e3rl-environment", daemon=True).start()
    try:
        value, error = found.get(timeout=seconds)
    except queue.Empty:
        raise UserError(
            f"{what} took longer than {seconds:g} s, before the run: make it faster, or raise environments.timeout"
        ) from None
    if error is not None:
        raise error
    return value


def evidence_of(config: EnvironmentsConfig) -> Callable[[tuple[ToolResult, ...]], float] | None:
    """The function that scores a turn's results as a reason to erase it; None: turns are not erased for their results."""
    if config.erase == "none":
        return None
    if config.erase == "errors":
        return lambda calls: float(any(call.failed for call in calls))
    if config.erase == "empty":
        return lambda calls: float(any(call.failed or call.result.strip() in _EMPTY for call in calls))
    return load("judge of turns", config.erase, {"none": "", "errors": "", "empty": ""})  # type: ignore[no-any-return]
