"""Request bodies of the decoding endpoints, read strictly: a field is honoured, harmless, or refused with a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from e3rl.errors import unknown
from e3rl.serve.errors import ApiError, invalid
from e3rl.serve.fields import IGNORED, NEUTRAL, boolean, integer, is_text, is_token, number, table, text, tokens
from e3rl.serve.grammar import Grammar, read_grammar
from e3rl.serve.messages import Chat, ToolChoice, read_messages, read_tools

MAX_SAMPLES = 128
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
MIN_TEMPERATURE = 1e-6
"""Smallest temperature but 0: logits divided by less may overflow."""

_SAMPLING = {
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "stop_token_ids", "min_tokens"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "ignore_eos", "logprobs"),
    *("include_stop_str_in_output", "skip_special_tokens", "structured_outputs"),
}
_COMMON = _SAMPLING | {
    "user",
    "safety_identifier",
    "model",
    "stream",
    "stream_options",
    "e3rl",
    "return_token_ids",
    "return_tokens_as_token_ids",
}
_CHAT = _COMMON | {
    *("messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"),
    *("response_format", "chat_template_kwargs"),
}
_TEXT = _COMMON | {"prompt", "response_format", "add_special_tokens"}
_GENERATE = {
    "user",
    "safety_identifier",
    "model",
    "token_ids",
    "sampling_params",
    "stream",
    "stream_options",
    "e3rl",
    "return_token_ids",
}
_TOKENIZE_CHAT = {"model", "return_token_strs", "messages", "tools", "chat_template_kwargs", "add_special_tokens"}
_TOKENIZE_TEXT = {"model", "return_token_strs", "prompt", "add_special_tokens"}


@dataclass(frozen=True)
class Shaping:
    """How logits are changed before a token is drawn, token by token."""

    frequency: float = 0.0
    presence: float = 0.0
    repetition: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    grammar: Grammar | None = None


@dataclass(frozen=True)
class Output:
    """What an answer carries beside its text. ``logprobs`` is how many of the likeliest tokens; None: no log-probabilities."""

    logprobs: int | None = None
    token_ids: bool = False
    tokens_as_ids: bool = False
    keep_stop: bool = False
    keep_special: bool = False


@dataclass(frozen=True)
class DecodingRequest:
    """What a client asked for. None: the server's default; so does an empty ``model``."""

    model: str
    prompts: tuple[str | Chat | tuple[int, ...], ...]
    n: int = 1
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    stream: bool = False
    include_usage: bool = False
    add_special_tokens: bool = True
    tools: ToolChoice = field(default_factory=ToolChoice)
    shaping: Shaping = Shaping()
    output: Output = Output()
    extension: Mapping[str, Any] = field(default_factory=dict)
    user: str = ""


def read_chat(body: Any) -> DecodingRequest:
    """The body of POST /v1/chat/completions."""
    fields = _fields(body, _CHAT)
    choice = read_tools(fields)
    arguments = table(fields, "chat_template_kwargs")
    chat = Chat(read_messages(fields.get("messages")), choice.tools, arguments)
    top = integer(fields, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    wanted = boolean(fields, "logprobs")
    if top is not None and top > 0 and not wanted:
        raise invalid("top_logprobs", "only with logprobs = true")
    grammar = read_grammar(fields)
    if grammar is not None and choice.tools:
        raise invalid("response_format", "can't be combined with tools: a call has its tool's schema")
    return _request(fields, (chat,), _chat_limit(fields), (top or 0) if wanted else None, grammar, choice)


def read_text(body: Any) -> DecodingRequest:
    """The body of POST /v1/completions. A prompt is text or token ids, used as it stands."""
    fields = _fields(body, _TEXT)
    top = fields.get("logprobs")  # a number here; false is the default
    count = None if top is False else integer(fields, "logprobs", 0, MAX_TOP_LOGPROBS)
    limit = integer(fields, "max_tokens", 1)
    return _request(fields, _prompts(fields.get("prompt")), limit, count, read_grammar(fields), ToolChoice())


def read_generate(body: Any) -> DecodingRequest:
    """The body of POST /inference/v1/generate: token ids in, token ids out."""
    fields = _fields(body, _GENERATE)
    ids = tokens(fields, "token_ids", 2**20)
    if not ids:
        raise invalid("token_ids", "a list of at least one token id is required")
    given = {k: v for k, v in fields.items() if k not in ("token_ids", "sampling_params")}
    sampling = _fields(table(fields, "sampling_params"), _SAMPLING | {"temperature"}, "sampling_params")
    count = integer(sampling, "logprobs", 0, MAX_TOP_LOGPROBS)
    merged = {"model": "", **given, **sampling, "return_token_ids": True, "return_tokens_as_token_ids": True}
    limit = integer(sampling, "max_tokens", 1)
    return _request(merged, (ids,), limit, count, read_grammar(sampling), ToolChoice())


def read_tokenize(body: Any) -> DecodingRequest:
    """The body of POST /tokenize: a text, or messages as a chat has them."""
    known = _TOKENIZE_CHAT if isinstance(body, dict) and "messages" in body else _TOKENIZE_TEXT
    fields = _fields(body, known)
    boolean(fields, "return_token_strs")
    if "messages" in fields:
        chat = Chat(read_messages(fields["messages"]), read_tools(fields).tools, table(fields, "chat_template_kwargs"))
        return DecodingRequest("", (chat,))
    prompt = fields.get("prompt")
    if not is_text(prompt):
        raise invalid("prompt", "must be a text; or send messages")
    return DecodingRequest("", (str(prompt),), add_special_tokens=boolean(fields, "add_special_tokens", True))


def read_detokenize(body: Any) -> tuple[int, ...]:
    """The body of POST /detokenize."""
    return tokens(_fields(body, {"model", "tokens"}), "tokens", 2**20)


def _fields(body: Any, known: set[str], what: str = "the body") -> dict[str, Any]:
    """The fields that are set. Unknown ones, and known ones that ask for what is not offered, are refused."""
    if not isinstance(body, dict):
        raise ApiError(400, f"{what} must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    for name in given.keys() - known:
        if name not in NEUTRAL:
            raise ApiError(400, str(unknown("field", name, known)), param=name)
        if given[name] not in NEUTRAL[name]:
            raise invalid(name, "this server does not offer it; leave it out")
    return {name: value for name, value in given.items() if name in known}


def _request(
    fields: Mapping[str, Any],
    prompts: tuple[Any, ...],
    max_tokens: int | None,
    logprobs: int | None,
    grammar: Grammar | None,
    choice: ToolChoice,
) -> DecodingRequest:
    model = fields.get("model")
    if not isinstance(model, str):
        raise invalid("model", "a string is required; GET /v1/models lists what is served")
    stream = boolean(fields, "stream")
    top_k = integer(fields, "top_k", -1, 10**6)
    return DecodingRequest(
        model=model,
        prompts=prompts,
        n=integer(fields, "n", 1, MAX_SAMPLES) or 1,
        max_tokens=max_tokens,
        temperature=_temperature(fields),
        top_p=number(fields, "top_p", 0, 1),
        top_k=None if top_k is None else max(top_k, 0),
        min_p=number(fields, "min_p", 0, 1) or 0.0,
        seed=integer(fields, "seed", -(2**63), 2**63 - 1),
        stop=_stops(fields.get("stop", [])),
        stop_ids=tokens(fields, "stop_token_ids", MAX_STOPS),
        stream=stream,
        include_usage=_include_usage(fields, stream),
        add_special_tokens=boolean(fields, "add_special_tokens", True),
        tools=choice,
        shaping=_shaping(fields, grammar),
        output=Output(
            logprobs,
            boolean(fields, "return_token_ids"),
            boolean(fields, "return_tokens_as_token_ids"),
            boolean(fields, "include_stop_str_in_output"),
            not boolean(fields, "skip_special_tokens", True),
        ),
        extension=table(fields, "e3rl"),
        user=text(fields, "safety_identifier") or text(fields, "user"),
    )


def _shaping(fields: Mapping[str, Any], grammar: Grammar | None) -> Shaping:
    repetition = number(fields, "repetition_penalty", 0.01, 100)
    ignore_eos = boolean(fields, "ignore_eos")
    min_tokens = integer(fields, "min_tokens", 0, 2**20) or 0
    if grammar is not None and (ignore_eos or min_tokens):
        raise invalid(
            "ignore_eos" if ignore_eos else "min_tokens", "can't be combined with a grammar, which says the end"
        )
    return Shaping(
        number(fields, "frequency_penalty", -2, 2) or 0.0,
        number(fields, "presence_penalty", -2, 2) or 0.0,
        1.0 if repetition is None else repetition,
        _biases(fields),
        min_tokens,
        ignore_eos,
        grammar,
    )


def _biases(fields: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    given = table(fields, "logit_bias")
    if len(given) > MAX_BIASES:
        raise invalid("logit_bias", f"at most {MAX_BIASES} tokens")
    biases = []
    for key in given:
        bias = number(given, key, -100, 100)
        if not (key.isascii() and key.isdigit() and len(key) < 10) or bias is None:
            raise invalid("logit_bias", "must be an object of token ids, as strings, and numbers from -100 to 100")
        biases.append((int(key), bias))
    return tuple(biases)


def _chat_limit(fields: Mapping[str, Any]) -> int | None:
    limits = {integer(fields, name, 1) for name in ("max_tokens", "max_completion_tokens")} - {None}
    if len(limits) > 1:
        raise invalid("max_tokens", "differs from max_completion_tokens; send one of them")
    return limits.pop() if limits else None


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    several = value if isinstance(value, list) and value and not is_token(value[0]) else [value]
    if len(several) > MAX_PROMPTS:
        raise invalid("prompt", f"at most {MAX_PROMPTS} prompts a request")
    return tuple(_prompt(p) for p in several)


def _prompt(value: Any) -> str | tuple[int, ...]:
    if is_text(value) and value:
        return str(value)
    if isinstance(value, list) and value and all(is_token(i) for i in value):
        return tuple(value)
    raise invalid("prompt", "must be a text or a list of token ids, not empty, or a list of these")


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise invalid("stop", "must be a string that is not empty, or a list of these")
    if len(stops) > MAX_STOPS or any(len(s) > MAX_STOP_LENGTH for s in stops):
        raise invalid("stop", f"at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def _include_usage(fields: Mapping[str, Any], stream: bool) -> bool:
    options = table(fields, "stream_options")
    if not options.keys() <= {"include_usage", "include_obfuscation", "continuous_usage_stats"}:
        raise invalid("stream_options", "must be an object; include_usage is its one field here")
    if options and not stream:
        raise invalid("stream_options", "only with stream = true")
    if boolean(options, "continuous_usage_stats"):
        raise invalid("stream_options.continuous_usage_stats", "this server sends usage at the end; leave it out")
    return boolean(options, "include_usage")


def _temperature(fields: Mapping[str, Any]) -> float | None:
    value = number(fields, "temperature", 0, 2)
    if value is not None and 0 < value < MIN_TEMPERATURE:
        raise invalid("temperature", f"must be 0, or a number from {MIN_TEMPERATURE:g} to 2")
    return value
