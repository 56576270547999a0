"""A run's tools during rollouts: an environment for each trajectory, its calls carried out, its state brought back."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from e3rl.config import Config, EnvironmentsConfig
from e3rl.data.prompts import render_prompts
from e3rl.data.toolcalls import ToolCall
from e3rl.environments.dialogue import Dialogue
from e3rl.environments.protocol import Reply
from e3rl.environments.tools import (
    call,
    can_go_back,
    check_restore,
    create,
    evidence_of,
    make,
    reset,
    schemas_of,
    tools_of,
)
from e3rl.errors import UserError
from e3rl.types import Message, Observed, Problem, Prompt, ToolResult


class Toolbox:
    """A run's tools (`e3rl.environments.protocol.Tools`). Whatever is wrong with environment or template is an error here."""

    def __init__(self, config: EnvironmentsConfig, tokenizer: Any, arguments: dict[str, Any]) -> None:
        self.config, self._factory = config, make(config)
        trial = create(self._factory, config.factory)
        self.schemas = schemas_of(trial, config.factory)
        self.dialogue = Dialogue(tokenizer, arguments, self.schemas)
        self.evidence = evidence_of(config)
        self.deadline, self.erasures, self.threshold = config.timeout, config.max_turn_erasures, config.erase_threshold

    def said(self, problem: Problem) -> str:
        """What a fresh environment adds to a problem's prompt."""
        environment = create(self._factory, self.config.factory)
        text = reset(environment, problem, self.config.factory)
        return text

    def check(self, problem: Problem) -> None:
        """UserError where a turn could not be taken back, tried on one problem."""
        environment = create(self._factory, self.config.factory)
        reset(environment, problem, self.config.factory)
        check_restore(environment, self.schemas, self.config)

    def open(self, problem: Problem) -> LocalEpisode:
        """See `e3rl.environments.protocol.Tools.open`."""
        environment = create(self._factory, self.config.factory)
        reset(environment, problem, self.config.factory)
        return LocalEpisode(self, environment)


class LocalEpisode:
    """One trajectory's environment, in this process."""

    def __init__(self, toolbox: Toolbox, environment: Any) -> None:
        self._toolbox, self.environment = toolbox, environment
        self.broken: str | None = None
        self._turns = 0
        self._before: Any = None

    def act(self, ids: Sequence[int]) -> Reply:
        """See `e3rl.environments.protocol.Episode.act`."""
        box, config = self._toolbox, self._toolbox.config
        if self.broken is not None:
            return Reply(failure=self.broken)
        calls = box.dialogue.calls(ids)
        if not calls:
            return Reply(end="stop")
        if self._turns == config.max_turns:
            return Reply(end="length")
        undoable = box.evidence is not None and can_go_back(self.environment, config)
        if undoable:
            deep = config.state == "deepcopy"
            self._before = copy.deepcopy(self.environment) if deep else self.environment.snapshot()
        results = tuple(self._result(asked, n) for n, asked in enumerate(calls))
        against = 0.0 if box.evidence is None else float(box.evidence(results))
        observed = Observed(results, self._turns, against if math.isfinite(against) else 1.0)
        self._turns += 1
        return Reply(box.dialogue.after([(r.name, r.result) for r in results]), observed, undoable)

    def undo(self) -> None:
        """See `e3rl.environments.protocol.Episode.undo`. Where it fails, the trajectory has no reward."""
        self._turns -= 1
        try:
            if self._toolbox.config.state == "deepcopy":
                self.environment = self._before
            else:
                self.environment.restore(self._before)
        except Exception as error:  # the code of other authors
            self.broken = f"could not go back: {type(error).__name__}: {error}"

    def close(self) -> None:
        """Nothing is held."""

    def _result(self, asked: ToolCall, number: int) -> ToolResult:
        """The call carried out; what goes wrong is what the model sees."""
        try:
            if number >= self._toolbox.config.max_calls:
                raise ValueError(f"At most {self._toolbox.config.max_calls} calls a turn.")
            tool: Callable[..., Any] | None = tools_of(self.environment).get(asked.name)
            if tool is None:
                raise ValueError(f"Tool {asked.name} not found.")
            return ToolResult(asked.name, asked.arguments, str(call(tool, json.loads(asked.arguments))))
        except Exception as error:
            return ToolResult(asked.name, asked.arguments, str({"error": str(error)}), failed=True)


def tool_prompts(
    problems: Sequence[Problem], tokenizer: Any, config: Config, *, context_limit: int, completion_limit: int
) -> list[Prompt]:
    """`render_prompts`, with the tools of ``environments.factory`` where there are some."""
    limits = {"context_limit": context_limit, "completion_limit": completion_limit}
    if not config.environments.factory:
        return render_prompts(problems, tokenizer, config.data, **limits)
    if "tools" in config.data.chat_template_kwargs:
        raise UserError(
            "data.chat_template_kwargs sets 'tools', and environments.factory brings its own: leave one of them out"
        )
    box = Toolbox(config.environments, tokenizer, dict(config.data.chat_template_kwargs))
    if problems:
        box.check(problems[0])
    data = replace(config.data, chat_template_kwargs={**config.data.chat_template_kwargs, "tools": box.schemas})
    told = [_with(problem, box.said(problem)) for problem in problems]
    prompts = render_prompts(told, tokenizer, data, **limits)
    return [Prompt(problem, prompt.ids, box) for problem, prompt in zip(problems, prompts, strict=True)]


def _with(problem: Problem, said: str) -> Problem:
    """The problem with a text behind its last message."""
    if not said:
        return problem
    if isinstance(problem.prompt, str):
        return replace(problem, prompt=problem.prompt + said)
    last = problem.prompt[-1]
    return replace(problem, prompt=(*problem.prompt[:-1], Message(last.role, last.content + said)))
