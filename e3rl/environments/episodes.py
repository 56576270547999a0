"""A run's tools during rollouts: one environment for each trajectory, execution of calls, and undo."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from e3rl.config import Config, EnvironmentsConfig
from e3rl.data.prompts import render_prompts
from e3rl.data.toolcalls import ToolCall
from e3rl.environments.dialogue import Dialogue
from e3rl.environments.isolation import HostLost, HostProcesses, IsolatedHost
from e3rl.environments.protocol import Reply
from e3rl.environments.tools import (
    Host,
    can_go_back,
    create,
    evidence_of,
    kinds_of,
    make,
    row_of,
    schemas_of,
    toy_calls,
    within,
)
from e3rl.errors import UserError
from e3rl.types import Message, Observed, Problem, Prompt, ToolResult

_COLUMN = "environment"  # of a row, where environments.factory names several


class Toolbox:
    """A run's tools (`e3rl.environments.protocol.Tools`). Creating it checks environment and template.

    ``kind``: which one, where ``environments.factory`` names several (`Toolboxes`).
    """

    def __init__(
        self,
        config: EnvironmentsConfig,
        tokenizer: Any,
        arguments: dict[str, Any],
        ends: Sequence[int] = (),
        kind: str = "",
    ) -> None:
        self.config, self._kind, self._factory = config, kind, make(config.factory, kind)
        self._name = f"{config.factory}['{kind}']" if kind else config.factory
        deep = config.state == "deepcopy"
        trial = create(self._factory, self._name)
        self.schemas = schemas_of(trial, self._name)
        self.dialogue = Dialogue(tokenizer, arguments, self.schemas, ends)
        told = json.dumps([asdict(config), self.schemas, arguments], sort_keys=True, default=str)
        self.identity = f"{self._name} ({hashlib.blake2b(told.encode(), digest_size=4).hexdigest()})"
        self.evidence = evidence_of(config)
        self.undoable = self.evidence is not None and can_go_back(trial, config)
        self.deadline, self.erasures, self.threshold = config.timeout, config.max_turn_erasures, config.erase_threshold
        processes = HostProcesses(config.factory, config.timeout, deep=deep, kind=kind) if config.isolate else None
        self._host: Callable[[], Host | IsolatedHost] = (
            processes.open if processes else partial(Host, self._factory, self._name, deep=deep)
        )

    def said(self, problem: Problem) -> str:
        """The text that a fresh environment adds to a problem's prompt."""
        try:
            return str(self._timed(lambda: self._opened(problem)[1], "reset()"))
        except UserError:
            raise
        except Exception as error:  # user code may raise anything
            kind = getattr(error, "kind", type(error).__name__)
            raise UserError(
                f"environment '{self._name}': reset() fails on problem '{problem.id}': {kind}: {error}"
            ) from None

    def check(self, problem: Problem) -> None:
        """UserError if a turn can't be undone; tried on one problem, with a toy call of every tool."""
        if not self.undoable:
            return
        host = self._timed(lambda: self._opened(problem)[0], "reset()")
        self._timed(host.mark, "snapshot()")
        if self.config.state == "deepcopy":  # going back is nothing but taking the copy
            return
        for tool, arguments in toy_calls(self.schemas):
            self._timed(partial(_try, host, tool, arguments), f"a toy call of {tool}()")
        self._timed(host.compare, "going back")

    def _timed(self, work: Callable[[], Any], what: str) -> Any:
        """Apply the deadline, except to isolated environments: they have their own deadlines, and may start slowly."""
        what = f"environment '{self._name}': {what}"
        try:
            return work() if self.config.isolate else within(self.deadline, work, what)
        except HostLost as error:
            raise UserError(f"{what} {error}, before the run") from None

    def open(self, problem: Problem) -> HostedEpisode:
        """See `e3rl.environments.protocol.Tools.open`."""
        return HostedEpisode(self, self._opened(problem)[0])

    def _opened(self, problem: Problem) -> tuple[Host | IsolatedHost, str]:
        host, row = self._host(), row_of(problem)
        if self._kind:  # as in TRL it is the run's, not the environment's
            del row[_COLUMN]
        return host, host.reset(row)

    def of(self, problem: Problem) -> Toolbox:
        """The tools of a problem: here the same for all."""
        return self


class Toolboxes:
    """Several environments with their tools; a row's column ``environment`` names its own, as in TRL."""

    def __init__(self, boxes: Mapping[str, Toolbox]) -> None:
        self._boxes = dict(boxes)
        some = next(iter(self._boxes.values()))
        self.deadline, self.erasures, self.threshold = some.deadline, some.erasures, some.threshold
        self.identity = ", ".join(box.identity for box in self._boxes.values())

    def of(self, problem: Problem) -> Toolbox:
        """The tools of a problem's environment."""
        name = problem.columns.get(_COLUMN)
        if name not in self._boxes:
            raise UserError(
                f"problem '{problem.id}': its column '{_COLUMN}' is {name!r}, and environments.factory has "
                f"{', '.join(self._boxes)}"
            )
        return self._boxes[name]

    def open(self, problem: Problem) -> HostedEpisode:
        """See `e3rl.environments.protocol.Tools.open`."""
        return self.of(problem).open(problem)


class HostedEpisode:
    """One trajectory's environment, in this process or in a child process."""

    def __init__(self, toolbox: Toolbox, host: Host | IsolatedHost) -> None:
        self._toolbox, self._host = toolbox, host
        self._turns = 0

    @property
    def environment(self) -> Any:
        """What rewards are given."""
        return self._host.instance

    def act(self, ids: Sequence[int], begin: Callable[[], None]) -> Reply:
        """See `e3rl.environments.protocol.Episode.act`."""
        box = self._toolbox
        calls = box.dialogue.calls(ids)
        if not calls:
            return Reply(end="stop")
        if self._turns == box.config.max_turns:
            return Reply(end="length")
        began = time.perf_counter()
        results: tuple[ToolResult, ...] = ()
        try:
            if box.undoable:
                begin()
                self._host.save()
            for number, asked in enumerate(calls):
                begin()
                results += (self._result(asked, number),)
        except HostLost as error:
            return Reply(failure=str(error))
        seconds = time.perf_counter() - began
        begin()
        against = 0.0 if box.evidence is None else float(box.evidence(results))
        observed = Observed(results, self._turns, against if math.isfinite(against) else 1.0, seconds=seconds)
        self._turns += 1
        return Reply(box.dialogue.after([(r.name, r.result) for r in results]), observed, box.undoable)

    def undo(self) -> Reply:
        """See `e3rl.environments.protocol.Episode.undo`. If it fails, the trajectory has no reward."""
        self._turns -= 1
        try:
            self._host.go_back()
        except Exception as error:  # user code may raise anything
            return Reply(failure=f"could not go back: {type(error).__name__}: {error}")
        return Reply()

    def close(self) -> None:
        """End the environment's own process, if it has one."""
        self._host.close()

    def _result(self, asked: ToolCall, number: int) -> ToolResult:
        """Execute the call; the model sees an error as its result."""
        try:
            if number >= self._toolbox.config.max_calls:
                raise ValueError(f"At most {self._toolbox.config.max_calls} calls a turn.")
            return ToolResult(asked.name, asked.arguments, self._host.call(asked.name, asked.arguments))
        except HostLost:
            raise
        except Exception as error:
            return ToolResult(asked.name, asked.arguments, str({"error": str(error)}), failed=True)


def _try(host: Host | IsolatedHost, tool: str, arguments: str) -> None:
    """Call a tool that may raise."""
    try:
        host.call(tool, arguments)
    except HostLost:
        raise
    except (Exception, SystemExit):
        pass


def toolbox(config: Config, tokenizer: Any, ends: Sequence[int] = ()) -> Toolbox | Toolboxes | None:
    """The tools of ``environments.factory``, if any. ``ends``: ids that end a turn."""
    if not config.environments.factory:
        return None
    if "tools" in config.data.chat_template_kwargs:
        raise UserError(
            "data.chat_template_kwargs sets 'tools', and environments.factory brings its own: leave one of them out"
        )
    arguments = dict(config.data.chat_template_kwargs)
    kinds = kinds_of(config.environments.factory)
    if not kinds:
        return Toolbox(config.environments, tokenizer, arguments, ends)
    return Toolboxes({kind: Toolbox(config.environments, tokenizer, arguments, ends, kind) for kind in kinds})


def tool_prompts(
    problems: Sequence[Problem],
    tokenizer: Any,
    config: Config,
    *,
    context_limit: int,
    completion_limit: int,
    ends: Sequence[int] = (),
) -> list[Prompt]:
    """`render_prompts`, with the run's `toolbox`."""
    limits = {"context_limit": context_limit, "completion_limit": completion_limit}
    tools = toolbox(config, tokenizer, ends)
    if tools is None:
        return render_prompts(problems, tokenizer, config.data, **limits)
    boxes = [tools.of(problem) for problem in problems]
    found: dict[int, Prompt] = {}
    for box in dict.fromkeys(boxes):
        mine = [n for n, its in enumerate(boxes) if its is box]
        box.check(problems[mine[0]])
        data = replace(config.data, chat_template_kwargs={**config.data.chat_template_kwargs, "tools": box.schemas})
        told = [_with(problems[n], box.said(problems[n])) for n in mine]
        rendered = render_prompts(told, tokenizer, data, **limits)
        found |= {n: Prompt(problems[n], prompt.ids, tools) for n, prompt in zip(mine, rendered, strict=True)}
    return [found[n] for n in range(len(problems))]


def _with(problem: Problem, said: str) -> Problem:
    """The problem with a text added to its last message."""
    if not said:
        return problem
    if isinstance(problem.prompt, str):
        return replace(problem, prompt=problem.prompt + said)
    last = problem.prompt[-1]
    return replace(problem, prompt=(*problem.prompt[:-1], Message(last.role, last.content + said)))
