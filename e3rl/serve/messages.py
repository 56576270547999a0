"""Conversations and tools of a request, as a chat template takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from e3rl.data.prompts import ROLES
from e3rl.errors import unknown
from e3rl.serve.errors import ApiError, invalid
from e3rl.serve.fields import is_text, table

MAX_TOOLS = 128
_PASSED_ON = ("name", "tool_call_id", "reasoning_content", "reasoning")
"""Texts of a message that templates may know."""


@dataclass(frozen=True)
class Chat:
    """A conversation: messages, tools and the client's own arguments of the template."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)


def read_messages(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The field ``messages``; the last must not be the assistant's."""
    if not isinstance(value, list) or not value:
        raise invalid("messages", "a list of at least one message is required")
    messages = tuple(_message(message, f"messages[{index}]") for index, message in enumerate(value))
    if messages[-1]["role"] == "assistant":
        raise invalid("messages", "the last message is the assistant's; end with a user message or a tool's result")
    return messages


def _message(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise invalid(where, "must be an object with role and content")
    role = value.get("role")
    if not isinstance(role, str):
        raise invalid(f"{where}.role", "a string is required")
    if role not in ROLES:
        raise ApiError(400, f"{where}: {unknown('role', role, ROLES)}", param=f"{where}.role")
    message: dict[str, Any] = {"role": role}
    calls = _calls(value["tool_calls"], f"{where}.tool_calls") if value.get("tool_calls") else []
    if calls and role != "assistant":
        raise invalid(f"{where}.tool_calls", "only an assistant's message has tool calls")
    without_content = bool(calls) and value.get("content") is None
    message["content"] = "" if without_content else _content(value.get("content"), f"{where}.content")
    if calls:
        message["tool_calls"] = calls
    for name in _PASSED_ON:
        if value.get(name) is not None:
            if not is_text(value[name]):
                raise invalid(f"{where}.{name}", "must be a string")
            message[name] = value[name]
    for key in value.keys() - {"role", "content", "tool_calls", *_PASSED_ON}:
        if value[key] not in (None, []):  # clients send their empty fields back
            raise invalid(f"{where}.{key}", "is not used here; leave it out")
    return message


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which is what templates take."""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise invalid(where, "must be a list of objects")
    calls = []
    for index, call in enumerate(value):
        function = call.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not is_text(name):
            raise invalid(f"{where}[{index}]", 'needs "function" with name and arguments')
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            raise invalid(f"{where}[{index}].function.arguments", "must be a JSON object")
        kept: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if is_text(call.get("id")):
            kept["id"] = call["id"]
        calls.append(kept)
    return calls


def _content(value: Any, where: str) -> str:
    if is_text(value):
        return str(value)
    if isinstance(value, list) and all(_is_text_part(part) for part in value):
        return "".join(part["text"] for part in value)
    raise invalid(where, "must be a string, or a list of parts of type 'text'")


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and is_text(part.get("text"))


@dataclass(frozen=True)
class ToolChoice:
    """Which tools a model is shown, and whether it must call one: any of them, or the one that is named."""

    tools: tuple[Mapping[str, Any], ...] = ()
    forced: tuple[Mapping[str, Any], ...] = ()
    parallel: bool = True


def read_tools(fields: Mapping[str, Any]) -> ToolChoice:
    """The fields ``tools``, ``tool_choice`` and ``parallel_tool_calls``."""
    tools, choice = _tools(fields.get("tools") or []), fields.get("tool_choice")
    parallel = fields.get("parallel_tool_calls", True)
    if not isinstance(parallel, bool):
        raise invalid("parallel_tool_calls", "must be true or false")
    if choice == "none":
        return ToolChoice()
    if choice in (None, "auto"):
        return ToolChoice(tools, (), parallel)
    if not tools:
        raise invalid("tool_choice", "needs tools")
    if choice == "required":
        return ToolChoice(tools, tools, parallel)
    named = choice.get("function", {}).get("name") if _is_named(choice) else None
    chosen = tuple(t for t in tools if t["function"]["name"] == named)
    if not chosen:
        names = ", ".join(t["function"]["name"] for t in tools)
        raise invalid(
            "tool_choice", f'must be "none", "auto", "required" or {{"type": "function", "function": {{"name": …}}}} '
            f"with one of {names}"
        )  # fmt: skip
    return ToolChoice(tools, chosen, parallel=False)


def _is_named(choice: Any) -> bool:
    return isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict)


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise invalid("tools", f"must be a list of at most {MAX_TOOLS} tools")
    for index, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not is_text(function.get("name")) or not function["name"]:
            raise invalid(f"tools[{index}]", 'must be {"type": "function", "function": {"name": …, "parameters": …}}')
        table(function, "parameters")
    names = [tool["function"]["name"] for tool in value]
    if len(set(names)) < len(names):
        raise invalid("tools", "two tools have the same name")
    return tuple(value)
