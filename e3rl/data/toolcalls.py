"""Reads tool calls from a model's text, in the format of its chat template. Nothing is executed here.

Text that looks like a call but can't be read stays text, unchanged. Time is linear in the length of the text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function's name and its arguments, a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallFormat:
    """How a family of models writes calls: each between ``opening`` and ``closing``. An empty ``closing`` is the text's end;
    an empty ``opening`` is for models whose whole answer is the call. ``around``: marks that enclose several calls."""

    name: str
    opening: str
    closing: str
    read: Callable[[str, Mapping[str, Any]], list[ToolCall]]
    around: tuple[str, ...] = ()


def tool_call_format(template: str) -> ToolCallFormat | None:
    """The format that a chat template (Jinja text) writes calls in; None if it is none of `FORMATS`."""
    found = next((name for mark, name in _MARKS if mark in template), None)
    return FORMATS[found] if found else None


def parse_tool_calls(
    text: str, form: ToolCallFormat, tools: Sequence[Mapping[str, Any]] = ()
) -> tuple[str, list[ToolCall]]:
    """The text outside the calls, and the calls in order.

    ``tools`` are OpenAI's tool objects: where arguments are written without quotes, the schema says which are strings.
    """
    schemas = {t["function"]["name"]: t["function"].get("parameters") or {} for t in tools}
    if not form.opening:
        calls = _calls(text, form, schemas)
        return ("", calls) if calls else (text, [])
    kept: list[str] = []
    calls, at = [], 0
    while (start := text.find(form.opening, at)) >= 0:
        inside = start + len(form.opening)
        end = text.find(form.closing, inside) if form.closing else -1
        stop = len(text) if end < 0 else end
        found = _calls(text[inside:stop], form, schemas)
        after = stop if end < 0 else end + len(form.closing)
        kept.append(text[at:start] if found else text[at:after])
        calls += found
        at = after
    kept.append(text[at:])
    beside = "".join(kept)
    for mark in form.around if calls else ():
        beside = beside.replace(mark, "")
    return (beside.rstrip(), calls) if calls else (text, [])


def _calls(body: str, form: ToolCallFormat, schemas: Mapping[str, Any]) -> list[ToolCall]:
    """The calls in a body; none if it is malformed."""
    try:
        return form.read(body.strip(), schemas)
    except (ValueError, RecursionError):
        return []


def _call(name: Any, arguments: Any) -> ToolCall:
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("no call")
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def _objects(value: Any) -> list[ToolCall]:
    """Calls as JSON: an object or a list of them, with the arguments under either of two names."""
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(v, dict) for v in found):
        raise ValueError("no call")
    return [_call(v.get("name"), v.get("arguments", v.get("parameters"))) for v in found]


def _read_json(body: str, schemas: Mapping[str, Any]) -> list[ToolCall]:
    return _objects(json.loads(body))


def _read_whole(text: str, schemas: Mapping[str, Any]) -> list[ToolCall]:
    """Llama 3: the answer is one object, or several with semicolons between."""
    calls: list[ToolCall] = []
    decoder, rest = json.JSONDecoder(), text.removeprefix("<|python_tag|>")
    at = 0
    while at < len(rest):
        value, at = decoder.raw_decode(rest, at)
        calls += _objects(value)
        while at < len(rest) and rest[at] in "; \n":
            at += 1
    return calls


def _read_mistral(body: str, schemas: Mapping[str, Any]) -> list[ToolCall]:
    """A list of objects, or NAME[ARGS]{…} as newer models write it, each after its own mark."""
    if body.startswith("["):
        return _objects(json.loads(body))
    calls = []
    for part in body.split("[TOOL_CALLS]"):
        brace = part.find("{")
        if brace < 0:
            raise ValueError("no call")
        name = part[:brace].removesuffix("[ARGS]").partition("[CALL_ID]")[0].strip()
        calls.append(_call(name, json.loads(part[brace:])))
    return calls


def _read_function(body: str, schemas: Mapping[str, Any]) -> list[ToolCall]:
    """<function=NAME><parameter=KEY>value</parameter>…</function>."""
    name, at = _between(body, 0, "<function=", ">")
    end = body.find("</function>", at)
    if end < 0:
        raise ValueError("no call")
    return [_call(name.strip(), _arguments(body[at:end], schemas, name, ("<parameter=", ">"), ("", "</parameter>")))]


def _read_arg_keys(body: str, schemas: Mapping[str, Any]) -> list[ToolCall]:
    """NAME<arg_key>key</arg_key><arg_value>value</arg_value>…"""
    name = body.partition("<arg_key>")[0].strip()
    marks = ("<arg_key>", "</arg_key>"), ("<arg_value>", "</arg_value>")
    return [_call(name, _arguments(body, schemas, name, *marks))]


def _read_harmony(body: str, schemas: Mapping[str, Any]) -> list[ToolCall]:
    """NAME<|channel|>commentary json<|message|>{…}, with or without <|constrain|>: what follows "to=functions."."""
    head, message, arguments = body.partition("<|message|>")
    name = head.partition("<|")[0].split()
    if not message or not name:
        raise ValueError("no call")
    return [_call(name[0], json.loads(arguments))]


def _read_deepseek(body: str, schemas: Mapping[str, Any]) -> list[ToolCall]:
    """function<sep>NAME and a fenced block of JSON (V3, R1), or NAME<sep>{…} (V3.1 and later)."""
    left, mark, right = body.partition("<｜tool▁sep｜>")
    if not mark:
        raise ValueError("no call")
    name, fence, block = right.partition("```json")
    if not fence:
        return [_call(left.strip(), json.loads(right))]
    return [_call(name.strip(), json.loads(block.strip().removesuffix("```")))]


def _read_python_calls(body: str, schemas: Mapping[str, Any]) -> list[ToolCall]:
    """[NAME(key='value', …), …], by transformers' own parser."""
    from transformers.utils.chat_parsing.content_parsers import parse_content

    return _objects(parse_content(body, "python-call-list", {}))


def _read_gemma(body: str, schemas: Mapping[str, Any]) -> list[ToolCall]:
    """NAME{key:<|"|>text<|"|>,key:3}, by transformers' own parser."""
    from transformers.utils.chat_parsing.content_parsers import parse_content

    brace = body.find("{")
    if brace < 0 or body.count('<|"|>') % 2:  # an opening mark without its closing one makes that parser slow
        raise ValueError("no call")
    dialect = {"string_delims": [['<|"|>', '<|"|>']], "unquoted_keys": True}
    return [_call(body[:brace].strip(), parse_content(body[brace:], "json", dialect))]


def _arguments(
    text: str, schemas: Mapping[str, Any], function: str, keys: tuple[str, str], values: tuple[str, str]
) -> dict[str, Any]:
    """Keys and values between their marks."""
    arguments, properties, at = {}, _properties(schemas, function), 0
    while text.find(keys[0], at) >= 0:
        key, at = _between(text, at, *keys)
        value, at = _between(text, at, *values)
        arguments[key.strip()] = _value(value.removeprefix("\n").removesuffix("\n"), properties.get(key.strip()))
    return arguments


def _between(text: str, at: int, opening: str, closing: str) -> tuple[str, int]:
    """The text between two marks, searched from ``at``, and the position after the closing one."""
    start = text.find(opening, at) + len(opening)
    end = text.find(closing, start)
    if start < at + len(opening) or end < 0:
        raise ValueError("no call")
    return text[start:end], end + len(closing)


def _properties(schemas: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    schema = schemas.get(name.strip())
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return properties if isinstance(properties, dict) else {}


def _value(text: str, schema: Any) -> Any:
    """The JSON value; the text itself if it isn't JSON or the schema asks for a string."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


FORMATS = {
    form.name: form
    for form in (
        ToolCallFormat("hermes", "<tool_call>", "</tool_call>", _read_json),
        ToolCallFormat("function", "<tool_call>", "</tool_call>", _read_function),
        ToolCallFormat("arg-keys", "<tool_call>", "</tool_call>", _read_arg_keys),
        ToolCallFormat("mistral", "[TOOL_CALLS]", "", _read_mistral),
        ToolCallFormat("llama3", "", "", _read_whole),
        ToolCallFormat("harmony", "to=functions.", "<|call|>", _read_harmony),
        ToolCallFormat(
            "deepseek",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            _read_deepseek,
            ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        ),
        ToolCallFormat("python-calls", "<|tool_call_start|>", "<|tool_call_end|>", _read_python_calls),
        ToolCallFormat("gemma", "<|tool_call>call:", "<tool_call|>", _read_gemma),
    )
}
"""By name: Hermes, Qwen2.5 and Qwen3; Qwen3-Coder, Qwen3.5 and Nemotron 3; GLM 4.5; Mistral; Llama 3; gpt-oss; DeepSeek V3 and
later; LFM2; Gemma 4."""

_MARKS = (
    ("to=functions.", "harmony"),
    ('functions." + tool_call', "harmony"),
    ("<｜tool▁call▁begin｜>", "deepseek"),
    ("<|tool_call>call:", "gemma"),
    ("<|tool_call_start|>", "python-calls"),
    ("<|tool_response_start|>", "python-calls"),
    ("<function=", "function"),
    ("<arg_key>", "arg-keys"),
    ("[TOOL_CALLS]", "mistral"),
    ("<tool_call>", "hermes"),
    ("ipython", "llama3"),
)
