"""Whatever JSON a client sends, reading it ends in a request or in an error with a status."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e3rl.config import Config
from e3rl.errors import UserError
from e3rl.serve.errors import ApiError
from e3rl.serve.fields import NEUTRAL
from e3rl.serve.messages import Chat
from e3rl.serve.requests import DecodingRequest, read_chat, read_generate, read_text, read_tokenize
from e3rl.serve.settings import MAX_ERASURES, decoding

KEYS = ["role", "content", "type", "function", "name", "arguments", "parameters", "json", "json_schema", "schema", "regex",
        "tool_calls", "1"]  # fmt: skip
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=6,
)
FIELDS = [
    "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "seed", "stop", "stream",
    "stream_options", "e3rl", "logprobs", "tools", "user", "other", "top_logprobs", "tool_choice", "parallel_tool_calls",
    "response_format", "structured_outputs", "chat_template_kwargs", "logit_bias", "min_p", "top_k", "min_tokens",
    "repetition_penalty", "frequency_penalty", "stop_token_ids", "return_token_ids", "ignore_eos", "token_ids",
    "sampling_params", "add_special_tokens",
]  # fmt: skip
MESSAGE = st.fixed_dictionaries({"role": st.just("user"), "content": st.text(min_size=1, max_size=3)})
EXTENSION = st.dictionaries(
    st.sampled_from(["erase", "segment_length", "top_k", "max_erasures", "kappa0", "rho", "baseline", "return_erased"]),
    st.booleans() | st.integers(-2, 40) | st.floats() | st.sampled_from(["group", "static"]),
    max_size=4,
)


def _read(read: Callable[[Any], DecodingRequest], body: Any) -> DecodingRequest | ApiError:
    try:
        return read(body)
    except ApiError as error:
        return error


@settings(max_examples=150)
@given(
    st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=5),
    st.fixed_dictionaries({"messages": st.lists(MESSAGE)}),
)
def test_any_object_is_read_or_refused(fields: dict[str, Any], base: dict[str, Any]):
    for read, body in (
        (read_chat, {"model": "m", **base, **fields}),
        (read_text, {"model": "m", "prompt": "1", **fields}),
        (read_generate, {"token_ids": [1], **fields}),
        (read_generate, {"token_ids": [1], "sampling_params": fields}),
        (read_tokenize, {"prompt": "1", **fields}),
        (read_tokenize, {**base, **fields}),
    ):
        found = _read(read, body)
        if isinstance(found, ApiError):
            assert found.status == 400
            assert found.message
        else:
            assert 1 <= found.n <= 128
            assert found.prompts
            assert found.temperature is None or 0 <= found.temperature <= 2


@settings(max_examples=150)
@given(
    EXTENSION, st.none() | st.integers(1, 60), st.sampled_from([None, 0.0, 0.5]), st.integers(1, 3), st.integers(-5, 50)
)
def test_settings_of_a_request_stay_in_their_bounds(
    extension: dict[str, Any], max_tokens: int | None, temperature: float | None, n: int, room: int
):
    request = DecodingRequest("m", ("1",), n=n, max_tokens=max_tokens, temperature=temperature, extension=extension)
    try:
        found = decoding(request, Config(), None, room=room)
    except (ApiError, UserError):
        return
    assert 1 <= found.rollout.completion_limit <= room
    assert found.rollout.completion_limit == min(room, max_tokens or found.rollout.completion_limit)
    assert found.erasure.max_erasures <= MAX_ERASURES
    assert found.rollout.num_generations == n
    assert found.rollout.erase == (extension.get("erase", True) and temperature != 0 and found.rollout.top_k != 1)


def test_content_in_parts_and_empty_fields_of_an_earlier_answer():
    request = read_chat(
        {
            "model": "m",
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "+1"}]},
                {"role": "assistant", "content": "2", "refusal": None, "tool_calls": []},
                {"role": "user", "content": "why?"},
            ],
            "max_completion_tokens": 5,
            "max_tokens": 5,
        }
    )
    (chat,) = request.prompts
    assert isinstance(chat, Chat)
    assert [(m["role"], m["content"]) for m in chat.messages] == [("user", "1+1"), ("assistant", "2"), ("user", "why?")]
    assert request.max_tokens == 5


@pytest.mark.parametrize(
    ("fields", "extension", "named"),
    [
        ({"temperature": 0.0}, {}, "temperature"),
        ({"top_k": 1}, {}, "top_k"),
        ({}, {"top_k": 1}, "top_k"),
        ({"min_p": 1.0}, {}, "min_p"),
    ],
)
def test_what_can_only_be_drawn_one_way_is_not_erased(fields: dict[str, Any], extension: dict[str, Any], named: str):
    request = DecodingRequest("m", ("1",), n=2, extension=extension, **fields)
    assert decoding(request, Config(), None, room=9).rollout.erase is False
    with pytest.raises(ApiError, match="a redrawn segment is the same again") as refused:
        decoding(replace(request, extension={**extension, "erase": True}), Config(), None, room=9)
    assert refused.value.param == named


def test_a_client_that_sends_every_default_of_the_api_is_served():
    defaults: dict[str, Any] = {name: values[0] for name, values in NEUTRAL.items() if values}
    assert {"length_penalty", "echo", "best_of", "include_reasoning", "store"} <= defaults.keys()
    chat = read_chat({"model": "m", "messages": [{"role": "user", "content": "1"}], **defaults})
    assert chat == read_chat({"model": "m", "messages": [{"role": "user", "content": "1"}]})
    for name in NEUTRAL.keys() - {"add_special_tokens"}:
        with pytest.raises(ApiError, match=f"{name}: this server does not offer it") as refused:
            read_text({"model": "m", "prompt": "1", name: "other"})
        assert refused.value.param == name
