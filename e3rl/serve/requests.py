"""Request bodies of the two endpoints, read strictly: a field is honoured, harmless, or refused with a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from e3rl.errors import unknown
from e3rl.serve.errors import ApiError, invalid
from e3rl.types import Message

MAX_SAMPLES = 128
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MIN_TEMPERATURE = 1e-6
"""Smallest temperature but 0: logits divided by less may overflow."""

_COMMON = {"model", "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "seed", "stop", "e3rl"}
_CHAT = _COMMON | {"messages", "max_completion_tokens"}
_TEXT = _COMMON | {"prompt"}
_IGNORED = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Fields of the interface that do nothing here, with the values that ask for nothing. null always does."""


@dataclass(frozen=True)
class DecodingRequest:
    """What a client asked for. None means that it left the choice to the server."""

    model: str
    prompts: tuple[str | tuple[Message, ...] | tuple[int, ...], ...]
    n: int = 1
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    extension: Mapping[str, Any] = field(default_factory=dict)


def read_chat(body: Any) -> DecodingRequest:
    """The body of POST /v1/chat/completions."""
    fields = _fields(body, _CHAT)
    return _request(fields, (_messages(fields.get("messages")),), _chat_limit(fields))


def read_text(body: Any) -> DecodingRequest:
    """The body of POST /v1/completions. A prompt is text or token ids, used as it stands."""
    fields = _fields(body, _TEXT)
    return _request(fields, _prompts(fields.get("prompt")), _integer(fields, "max_tokens", 1))


def _fields(body: Any, known: set[str]) -> dict[str, Any]:
    """The fields that are set. Unknown ones, and known ones that ask for what is not offered, are refused."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None and name not in _IGNORED}
    for name in given.keys() - known:
        if name not in _NEUTRAL:
            raise ApiError(400, str(unknown("field", name, known)), param=name)
        if given[name] not in _NEUTRAL[name]:
            raise invalid(name, "this server does not offer it; leave it out")
    return {name: value for name, value in given.items() if name in known}


def _request(fields: Mapping[str, Any], prompts: tuple[Any, ...], max_tokens: int | None) -> DecodingRequest:
    model, extension = fields.get("model"), fields.get("e3rl", {})
    if not isinstance(model, str):
        raise invalid("model", "a string is required; GET /v1/models lists what is served")
    if not isinstance(extension, dict):
        raise invalid("e3rl", "must be an object")
    stream = _boolean(fields, "stream")
    return DecodingRequest(
        model=model,
        prompts=prompts,
        n=_integer(fields, "n", 1, MAX_SAMPLES) or 1,
        max_tokens=max_tokens,
        temperature=_temperature(fields),
        top_p=_number(fields, "top_p", 0, 1),
        seed=_integer(fields, "seed", -(2**63), 2**63 - 1),
        stop=_stops(fields.get("stop", [])),
        stream=stream,
        include_usage=_include_usage(fields, stream),
        extension=extension,
    )


def _chat_limit(fields: Mapping[str, Any]) -> int | None:
    limits = {_integer(fields, name, 1) for name in ("max_tokens", "max_completion_tokens")} - {None}
    if len(limits) > 1:
        raise invalid("max_tokens", "differs from max_completion_tokens; send one of them")
    return limits.pop() if limits else None


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise invalid("messages", "a list of at least one message is required")
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(value))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise invalid(where, "must be an object with role and content")
    for key in value.keys() - {"role", "content"}:
        if value[key] not in (None, []):  # clients send their empty fields back
            raise invalid(f"{where}.{key}", "only role and content are used here; leave it out")
    if not isinstance(value.get("role"), str):
        raise invalid(f"{where}.role", "a string is required")
    return Message(value["role"], _content(value.get("content"), f"{where}.content"))


def _content(value: Any, where: str) -> str:
    if _is_text(value):
        return str(value)
    if isinstance(value, list) and all(_is_text_part(part) for part in value):
        return "".join(part["text"] for part in value)
    raise invalid(where, "must be a string, or a list of parts of type 'text'")


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and _is_text(part.get("text"))


def _is_text(value: Any) -> bool:
    """A string that can be encoded: JSON escapes can write half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    several = value if isinstance(value, list) and value and not _is_token(value[0]) else [value]
    if len(several) > MAX_PROMPTS:
        raise invalid("prompt", f"at most {MAX_PROMPTS} prompts a request")
    return tuple(_prompt(p) for p in several)


def _prompt(value: Any) -> str | tuple[int, ...]:
    if _is_text(value) and value:
        return str(value)
    if isinstance(value, list) and value and all(_is_token(i) for i in value):
        return tuple(value)
    raise invalid("prompt", "must be a text or a list of token ids, not empty, or a list of these")


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise invalid("stop", "must be a string that is not empty, or a list of these")
    if len(stops) > MAX_STOPS or any(len(s) > MAX_STOP_LENGTH for s in stops):
        raise invalid("stop", f"at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def _include_usage(fields: Mapping[str, Any], stream: bool) -> bool:
    options = fields.get("stream_options", {})
    if not isinstance(options, dict) or not options.keys() <= {"include_usage", "include_obfuscation"}:
        raise invalid("stream_options", "must be an object; include_usage is its one field here")
    if options and not stream:
        raise invalid("stream_options", "only with stream = true")
    return _boolean(options, "include_usage")


def _boolean(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise invalid(name, "must be true or false")
    return value


def _integer(fields: Mapping[str, Any], name: str, low: int, high: int | None = None) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise invalid(name, f"must be a whole number of at least {low}" + (f" and at most {high}" if high else ""))
    return value


def _number(fields: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:  # NaN is not
        raise invalid(name, f"must be a number from {low} to {high}")
    return float(value)


def _temperature(fields: Mapping[str, Any]) -> float | None:
    value = _number(fields, "temperature", 0, 2)
    if value is not None and 0 < value < MIN_TEMPERATURE:
        raise invalid("temperature", f"must be 0, or a number from {MIN_TEMPERATURE:g} to 2")
    return value
