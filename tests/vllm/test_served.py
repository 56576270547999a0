"""`e3rl serve` on vLLM: the torch engine's answers, and a sentence for what needs logits to be changed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from e3rl.config import Config, load_config
from e3rl.lab.tokenizer import build_tokenizer
from e3rl.models import Policy
from e3rl.serve.errors import ApiError
from e3rl.serve.requests import read_chat, read_generate
from e3rl.serve.service import Service
from e3rl.serve.worker import Outbox
from tests.engine.models import EOS
from tests.vllm.conftest import LENGTH, ROWS

PLAIN = {"erase": False}
ERASING = {"erase": True, "segment_length": 6, "baseline": "static", "static_baseline": 0.5}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
TEMPLATE = '{{ messages[0][\'content\'] }}{% if tools %}<tool_call>{"name": "arguments"}</tool_call>{% endif %}'


@pytest.fixture
def policy(model: Any) -> Policy:
    tokenizer = build_tokenizer(LENGTH)
    tokenizer.chat_template = TEMPLATE
    return Policy(model, tokenizer, "tiny", tuple(EOS), LENGTH)


@pytest.fixture
def config() -> Config:
    return load_config(None, overrides=[f"rollout.max_rows={ROWS}", f"rollout.cache_rows={ROWS}"])


@pytest.fixture
def service(
    policy: Policy, config: Config, core: Any, make_engine: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Service]:
    """On the session's vLLM."""
    with monkeypatch.context() as patch:
        patch.setattr("e3rl.serve.service.build_engine", lambda *_: make_engine())
        service = Service(policy, config, None, name="tiny", max_length=LENGTH, queue_limit=8)
    yield service
    service.close()
    core._interrupted.clear()  # what ended the worker; the next poll of this vLLM is another test's


def settled(service: Service) -> bool:
    """Whether nothing is decoding any more, within a while."""
    for _ in range(200):
        if service.load() == {"decoding": 0, "waiting": 0, "free_rows": ROWS}:
            return True
        time.sleep(0.05)
    return False


def answered(service: Service, body: dict[str, Any]) -> list[tuple[list[int], int]]:
    """Each sample's ids, and how many segments were erased."""

    async def ask() -> list[tuple[list[int], int]]:
        running = service.start(read_generate(body), Outbox())
        async for _ in service.pieces(running):
            pass
        service.drop(running)
        return [(choice.tokens.ids, len(choice.erasures)) for choice in running.choices]

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("sampling", "extension"),
    [
        ({"n": 2}, PLAIN),
        ({"n": 2}, ERASING),
        ({"n": 3, "top_k": 5, "min_p": 0.05, "logprobs": 0}, PLAIN),
        ({"temperature": 0}, {}),
        ({"stop_token_ids": list(range(20, 30))}, PLAIN),
    ],
)
def test_answers_are_the_torch_engines(
    service: Service, policy: Policy, config: Config, sampling: dict[str, Any], extension: dict[str, Any]
):
    body = {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 30, "seed": 4, **sampling}, "e3rl": extension}
    expected = Service(policy, config, None, name="tiny", max_length=LENGTH, queue_limit=8)
    try:
        found = answered(service, body)
        assert found == answered(expected, body)
    finally:
        expected.close()
    assert (sum(erased for _, erased in found) > 0) == (extension is ERASING)
    assert settled(service)


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 1},
        {"presence_penalty": 1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {"5": 1}},
        {"min_tokens": 2},
        {"ignore_eos": True},
        {"logprobs": True, "top_logprobs": 2},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "1"}},
        {"tools": [TOOL], "tool_choice": "required"},
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.parametrize("extension", [PLAIN, ERASING], ids=["plain", "erasing"])
def test_what_changes_logits_is_refused_in_a_sentence(
    service: Service, fields: dict[str, Any], extension: dict[str, Any]
):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "1"}], "n": 2, "e3rl": extension, **fields}

    async def ask() -> None:
        service.start(read_chat(body), Outbox())

    with pytest.raises(ApiError, match=r"can't change logits: .* need rollout.engine = 'torch'") as refused:
        asyncio.run(ask())
    assert (refused.value.status, settled(service)) == (400, True)


def test_a_client_that_leaves_frees_its_rows_in_the_middle_of_a_segment(service: Service):
    async def leave() -> None:
        running = service.start(
            read_generate({"token_ids": [5], "sampling_params": {"n": ROWS, "max_tokens": 70}, "e3rl": PLAIN}), Outbox()
        )
        while not service.load()["decoding"]:
            await asyncio.sleep(0.01)
        service.drop(running)

    asyncio.run(leave())
    assert settled(service)
