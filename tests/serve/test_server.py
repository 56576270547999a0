"""The server under bad requests, bad luck and bad manners."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e3rl.cli import main
from e3rl.errors import NonFiniteLogits, UserError
from e3rl.serve.errors import ApiError
from e3rl.serve.requests import DecodingRequest
from e3rl.serve.server import MAX_BODY, make_server
from e3rl.serve.service import Running, Service
from e3rl.serve.worker import Outbox
from e3rl.types import Draw
from e3rl.web.access import Access
from tests.serve.conftest import serving
from tests.web.running import running as run_in_thread

CHAT, TEXT, GENERATE = "/v1/chat/completions", "/v1/completions", "/inference/v1/generate"
HI = {"model": "tiny", "messages": [{"role": "user", "content": "1"}]}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TOKEN = "a-token-of-some-length"
JSON = {"Content-Type": "application/json"}
HELLO = {"model": "tiny", "prompt": "3", "n": 2}


def post(
    url: str, path: str, body: Any, headers: dict[str, str] | None = None, method: str = "POST"
) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, raw, JSON | (headers or {}))
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


BAD = [
    (TEXT, b"{", 400, "not valid JSON"),
    (TEXT, b"[" * 100_000, 400, "not valid JSON"),
    (TEXT, [1], 400, "must be a JSON object"),
    (TEXT, {"prompt": "3"}, 400, "GET /v1/models"),
    (TEXT, {**HELLO, "model": "gpt"}, 404, "only 'tiny'"),
    (TEXT, {**HELLO, "temprature": 1}, 400, "Did you mean 'temperature'?"),
    (TEXT, {**HELLO, "logprobs": 21}, 400, "at most 20"),
    (TEXT, {**HELLO, "echo": True}, 400, "echo: this server does not offer it"),
    (TEXT, {**HELLO, "min_p": 2}, 400, "min_p: must be a number from 0 to 1"),
    (TEXT, {**HELLO, "logit_bias": {"a": 1}}, 400, "token ids, as strings"),
    (TEXT, {**HELLO, "logit_bias": {"9999": 1}}, 400, "token id 9999"),
    (TEXT, {**HELLO, "stop_token_ids": ["a"]}, 400, "list of at most 16 token ids"),
    (TEXT, {**HELLO, "top_k": 3, "e3rl": {"top_k": 4}}, 400, "differs from e3rl.top_k"),
    (TEXT, {**HELLO, "response_format": {"type": "xml"}}, 400, "json_schema"),
    (TEXT, {**HELLO, "ignore_eos": True, "response_format": {"type": "json_object"}}, 400, "can't be combined"),
    (CHAT, {**HI, "top_logprobs": 2}, 400, "only with logprobs = true"),
    (CHAT, {**HI, "tools": [{"type": "function"}]}, 400, "tools[0]: must be"),
    (CHAT, {**HI, "tools": [ADD, ADD]}, 400, "the same name"),
    (CHAT, {**HI, "tools": [ADD]}, 400, "no tool calls"),
    (CHAT, {**HI, "tool_choice": "required"}, 400, "needs tools"),
    (CHAT, {**HI, "tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "x"}}}, 400, "one of add"),
    (CHAT, {**HI, "tools": [ADD], "response_format": {"type": "json_object"}}, 400, "can't be combined with tools"),
    (CHAT, {**HI, "chat_template_kwargs": {"tokenize": False}}, 400, "'tokenize', which is no argument"),
    (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "1", "tool_calls": [1]}]}, 400, "tool_calls"),
    (CHAT, {"model": "tiny", "messages": [{"role": "tool", "content": "1"}]}, 400, "refuses it"),
    (GENERATE, {"token_ids": []}, 400, "at least one token id"),
    (GENERATE, {"token_ids": [1], "sampling_params": {"temprature": 1}}, 400, "Did you mean 'temperature'?"),
    ("/tokenize", {"prompt": 3}, 400, "must be a text"),
    ("/tokenize", [], 400, "must be a JSON object"),
    ("/detokenize", {"tokens": [-1]}, 400, "token ids"),
    (TEXT, {**HELLO, "temperature": 3}, 400, "from 0 to 2"),
    (TEXT, {**HELLO, "temperature": "hot"}, 400, "must be a number"),
    (TEXT, {**HELLO, "top_p": 0}, 400, "must be above 0"),
    (TEXT, {**HELLO, "n": 0}, 400, "at least 1"),
    (TEXT, {**HELLO, "n": 9}, 400, "8 rows"),
    (TEXT, {**HELLO, "n": True}, 400, "whole number"),
    (TEXT, {**HELLO, "stream": 1}, 400, "true or false"),
    (TEXT, {**HELLO, "stop": ["", "a"]}, 400, "not empty"),
    (TEXT, {**HELLO, "stream_options": {"include_usage": True}}, 400, "only with stream"),
    (TEXT, {**HELLO, "max_tokens": 256}, 400, "leaves room for 255 tokens"),
    (TEXT, {**HELLO, "prompt": "1" * 300}, 400, "leaves room for 0 tokens"),
    (TEXT, {**HELLO, "prompt": []}, 400, "list of token ids"),
    (TEXT, {**HELLO, "prompt": [1, "a"]}, 400, "list of token ids"),
    (TEXT, {**HELLO, "prompt": [9999]}, 400, "token id 9999"),
    (TEXT, {**HELLO, "prompt": ["a"] * 65}, 400, "at most 64"),
    (TEXT, {**HELLO, "prompt": ["a"] * 9}, 400, "9 prompts, and at most 8 groups"),
    (TEXT, {**HELLO, "prompt": "\ud800"}, 400, "must be a text"),
    (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "\udfff"}]}, 400, "messages[0].content"),
    (TEXT, {**HELLO, "prompt": [9999], "stream": True}, 400, "token id 9999"),
    (TEXT, {**HELLO, "e3rl": 1}, 400, "must be an object"),
    (TEXT, {**HELLO, "e3rl": {"erse": False}}, 400, "Did you mean 'erase'?"),
    (TEXT, {**HELLO, "e3rl": {"metric": "os:system"}}, 400, "unknown field of e3rl 'metric'"),
    (TEXT, {**HELLO, "e3rl": {"erase": "no"}}, 400, "e3rl.erase: expected true or false"),
    (TEXT, {**HELLO, "e3rl": {"max_erasures": 10**6}}, 400, "at most 20"),
    (TEXT, {**HELLO, "e3rl": {"kappa0": "x"}}, 400, "e3rl.kappa0: expected a number"),
    (CHAT, {"model": "tiny", "messages": []}, 400, "at least one message"),
    (CHAT, {"model": "tiny", "messages": [{"role": "user"}]}, 400, "messages[0].content"),
    (CHAT, {"model": "tiny", "messages": [{"role": "me", "content": "1"}]}, 400, "unknown role 'me'"),
    (CHAT, {"model": "tiny", "messages": [{"role": "assistant", "content": "1"}]}, 400, "end with a user message"),
    (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "'text'"),
    ("/v1/embeddings", {}, 404, "nothing at POST"),
]


def test_bad_requests_get_an_error_object_that_says_what_to_do(make_service: Callable[..., Service]):
    with serving(make_service()) as url:
        for path, body, status, words in BAD:
            got, answer = post(url, path, body)
            assert got == status, (body, answer)
            assert answer["error"].keys() == {"message", "type", "param", "code"}
            assert words in answer["error"]["message"], answer
        assert post(url, TEXT, HELLO)[0] == 200


def test_only_json_under_its_own_name(make_service: Callable[..., Service]):
    with serving(make_service()) as url:
        assert post(url, TEXT, HELLO, {"Content-Type": "text/plain"})[0] == 415
        assert post(url, TEXT, HELLO, {"Host": "evil.example"})[0] == 421
        assert post(url, "/v1/models", b"", {"Host": "evil.example"}, "GET")[0] == 421
        assert post(url, TEXT, b" " * (MAX_BODY + 1))[0] == 413
        assert post(url, "/nothing", b"", method="GET")[0] == 404


def test_a_method_that_is_not_offered_gets_an_error_object_too(make_service: Callable[..., Service]):
    with serving(make_service()) as url:
        status, answer = post(url, TEXT, HELLO, method="PUT")
        assert (status, answer["error"]["message"].partition(";")[0]) == (405, f"there is nothing at PUT {TEXT}")


@pytest.mark.parametrize(
    ("host", "token", "words"),
    [("0.0.0.0", None, "other machines"), ("127.0.0.1", "short", "at least 16"), ("::1", "a b" * 9, "at least 16")],
)
def test_the_door_is_not_left_open(host: str, token: str | None, words: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match=words):
        Access(host, token)
    given = ["serve", "lab", "--host", host, *(["--token", token] if token else [])]
    assert main(given) == 2
    assert words in capsys.readouterr().err


def test_host_names_that_a_server_answers_to():
    local, public = Access("127.0.0.1"), Access("0.0.0.0", "0123456789abcdef")
    assert all(local.knows_host(h) for h in ("localhost:8000", "127.0.0.1", "[::1]:80"))
    assert not any(local.knows_host(h) for h in ("", "evil.example", "10.0.0.1", "a@localhost", "[::1"))
    assert public.knows_host("10.0.0.1:8000")
    assert not public.knows_host("evil.example")


def test_an_error_of_ours_stays_ours(make_service: Callable[..., Service], monkeypatch, capsys):
    service = make_service()

    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    with serving(service) as url:
        monkeypatch.setattr(service, "start", broken)
        status, answer = post(url, TEXT, HELLO)
    assert status == 500
    assert "secret" not in json.dumps(answer)
    assert "secret" in capsys.readouterr().err


def test_broken_weights_fail_the_request_and_not_the_server(make_service: Callable[..., Service], monkeypatch):
    service = make_service()
    poll, failures = service._engine.poll, [NonFiniteLogits(Draw(0, 0, "p", 0, 0, 0)), MemoryError("secret")]

    def sometimes(*steps: int) -> Any:
        if failures:
            raise failures.pop(0)
        return poll(*steps)

    monkeypatch.setattr(service._engine, "poll", sometimes)
    with serving(service) as url:
        status, answer = post(url, TEXT, HELLO)
        assert (status, "NaN" in answer["error"]["message"]) == (500, True)
        status, answer = post(url, TEXT, HELLO)
        assert (status, answer["error"]["message"]) == (500, "decoding failed: MemoryError")
        assert post(url, TEXT, HELLO)[0] == 200
        assert settled(service)


def test_silent_connections_lock_nobody_out_and_many_streams_are_all_answered(make_service: Callable[..., Service]):
    with serving(make_service(queue_limit=300), TOKEN) as url, contextlib.ExitStack() as stack:
        host, port = url.removeprefix("http://").split(":")
        for _ in range(300):
            stack.enter_context(socket.create_connection((host, int(port))))
        found: list[tuple[int, bytes]] = []

        def stream() -> None:
            connection = http.client.HTTPConnection(host, int(port), timeout=60)
            body = json.dumps({**HELLO, "n": 1, "max_tokens": 4, "stream": True, "e3rl": {"erase": False}})
            connection.request("POST", TEXT, body, JSON | {"Authorization": f"Bearer {TOKEN}"})
            answer = connection.getresponse()
            found.append((answer.status, answer.read()))
            connection.close()

        threads = [threading.Thread(target=stream) for _ in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [(status, text.endswith(b"data: [DONE]\n\n")) for status, text in found] == [(200, True)] * 200


def test_a_token_is_asked_for_before_a_body_is_read(make_service: Callable[..., Service]):
    with serving(make_service(), TOKEN) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as line:
            line.sendall(f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MAX_BODY}\r\n\r\n".encode())
            assert line.recv(65536).startswith(b"HTTP/1.1 401")


def test_the_longest_prompt_and_answer_are_told(make_service: Callable[..., Service]):
    with serving(make_service()) as url:
        (card,) = post(url, "/v1/models", b"", method="GET")[1]["data"]
        assert card["max_model_len"] == 256
        assert post(url, TEXT, {**HELLO, "prompt": [1] * 250, "max_tokens": 6})[0] == 200
        assert post(url, TEXT, {**HELLO, "prompt": [1] * 250, "max_tokens": 7})[0] == 400


def slowed(service: Service, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Make every poll of the engine take a while; returns the list of polls made."""
    poll, polls = service._engine.poll, []

    def slow(*steps: int) -> Any:
        polls.append(time.monotonic())
        time.sleep(0.05)
        return poll(*steps)

    monkeypatch.setattr(service._engine, "poll", slow)
    return polls


def settled(service: Service) -> bool:
    """Whether nothing is decoding any more, within a while."""
    for _ in range(100):
        if service.load() == {"decoding": 0, "waiting": 0, "free_rows": 8}:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("last", [b"", b"x"], ids=["", "having sent a byte more"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_rows(
    make_service: Callable[..., Service], monkeypatch, stream: bool, last: bytes
):
    service = make_service(endless=True)
    polls = slowed(service, monkeypatch)
    body = json.dumps({**HELLO, "max_tokens": 240, "stream": stream, "e3rl": {"erase": False}}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving(service) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as line:
            line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            while not polls:
                time.sleep(0.01)
            line.sendall(last)
        assert settled(service)
    assert len(polls) < 30  # the whole answer takes 40


def test_what_does_not_fit_waits_and_too_much_is_refused(make_service: Callable[..., Service], monkeypatch):
    service = make_service(queue_limit=1, endless=True)
    slowed(service, monkeypatch)
    plain = {"erase": False}

    async def ask() -> None:
        first = service.start(DecodingRequest("tiny", ("3",), n=8, max_tokens=200, extension=plain), Outbox())
        while not service.load()["decoding"]:
            await asyncio.sleep(0.01)
        second = service.start(DecodingRequest("tiny", ("3",), n=1, max_tokens=6, extension=plain), Outbox())
        with pytest.raises(ApiError) as refused:
            service.start(DecodingRequest("tiny", ("3",), extension=plain), Outbox())
        assert (refused.value.status, refused.value.code) == (429, "overloaded")
        assert service.load() == {"decoding": 1, "waiting": 1, "free_rows": 0}
        service.drop(first)
        assert await choices_of(service, second) == [0]

    asyncio.run(ask())
    assert settled(service)


async def choices_of(service: Service, running: Running) -> list[int]:
    """The choice that each piece is of, to the end."""
    return [choice.index async for choice, _ in service.pieces(running)]


def test_requests_that_arrive_together_share_the_batch(make_service: Callable[..., Service], monkeypatch):
    service = make_service(endless=True)
    slowed(service, monkeypatch)
    asked = [DecodingRequest("tiny", ("3",), n=2, max_tokens=60, seed=s, extension={"erase": False}) for s in range(3)]

    async def ask() -> None:
        for running in [service.start(request, Outbox()) for request in asked]:
            await choices_of(service, running)

    asyncio.run(ask())
    stats = service._engine.stats
    assert stats.sampled_tokens == 3 * 2 * 60
    assert stats.decode_row_steps / stats.decode_steps > 4  # one client alone has 2 rows


def test_a_stopping_server_leaves_nobody_waiting(make_service: Callable[..., Service], monkeypatch):
    service = make_service(endless=True)
    slowed(service, monkeypatch)
    request = DecodingRequest("tiny", ("3",), n=8, max_tokens=240, extension={"erase": False})

    async def ask() -> None:
        both = [service.start(request, Outbox()), service.start(request, Outbox())]
        await asyncio.to_thread(service.close)
        for running in both:
            with pytest.raises(ApiError, match="stopping"):
                await choices_of(service, running)
        with pytest.raises(ApiError, match="stopping"):
            service.start(request, Outbox())

    asyncio.run(ask())


def test_a_stream_in_progress_ends_with_an_error_event_when_the_server_stops(
    make_service: Callable[..., Service], monkeypatch
):
    service = make_service(endless=True)
    slowed(service, monkeypatch)
    with serving(service) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        body = {**HELLO, "max_tokens": 240, "stream": True, "e3rl": {"erase": False}}
        connection.request("POST", TEXT, json.dumps(body), JSON)
        answer = connection.getresponse()
    *_, last, end = answer.read().decode().split("\n\n")
    assert end == ""
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is stopping"


def slow_steps(service: Service, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> list[float]:
    """Make every decode step take a while; returns the list of steps made."""
    model, steps = service._engine._slot_model, []
    decode = model.decode

    def slow(rows: Any) -> Any:
        steps.append(time.monotonic())
        time.sleep(seconds)
        return decode(rows)

    monkeypatch.setattr(model, "decode", slow)
    return steps


LONG = {"erase": False, "segment_length": 200}


def test_a_dropped_request_leaves_in_the_middle_of_a_segment(make_service: Callable[..., Service], monkeypatch):
    service = make_service(endless=True)
    steps = slow_steps(service, monkeypatch)

    async def ask() -> None:
        running = service.start(DecodingRequest("tiny", ("3",), n=8, max_tokens=200, extension=LONG), Outbox())
        while len(steps) < 5:
            await asyncio.sleep(0.01)
        service.drop(running)

    asyncio.run(ask())
    assert settled(service)
    assert len(steps) < 20  # of 199


def test_a_request_joins_in_the_middle_of_anothers_segment(make_service: Callable[..., Service], monkeypatch):
    service = make_service(endless=True)
    steps = slow_steps(service, monkeypatch)

    async def ask() -> None:
        first = service.start(DecodingRequest("tiny", ("3",), n=2, max_tokens=200, extension=LONG), Outbox())
        while len(steps) < 5:
            await asyncio.sleep(0.01)
        second = service.start(DecodingRequest("tiny", ("3",), max_tokens=6, extension=LONG), Outbox())
        assert await choices_of(service, second) == [0]
        assert len(steps) < 30
        assert len(await choices_of(service, first)) == 2

    asyncio.run(ask())


def test_a_stopping_server_lets_requests_in_progress_end(make_service: Callable[..., Service], monkeypatch):
    service = make_service(endless=True)
    steps = slow_steps(service, monkeypatch, 0.005)
    answers: list[tuple[int, dict[str, Any]]] = []
    server = make_server(service, Access("127.0.0.1"), 0, drain_s=60)
    with run_in_thread(server):
        body = {**HELLO, "max_tokens": 60, "e3rl": {"erase": False}}
        thread = threading.Thread(target=lambda: answers.append(post(server.url, TEXT, body)))
        thread.start()
        while not steps:
            time.sleep(0.01)
        server.stop()
        while not service._worker._draining:
            time.sleep(0.01)
        assert post(server.url, TEXT, HELLO)[1]["error"]["message"] == "the server is stopping"
        thread.join()
    assert answers[0][0] == 200
    assert answers[0][1]["usage"]["completion_tokens"] == 120


def test_the_command_serves_a_directory(directory: Path):
    command = [sys.executable, "-m", "e3rl", "serve", str(directory), "--port", "0", "--name", "mine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().split()[0]
            with urllib.request.urlopen(f"{url}/models", timeout=30) as answer:
                assert [m["id"] for m in json.load(answer)["data"]] == ["mine"]
        finally:
            process.send_signal(2)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "single samples need" in errors
    assert "Traceback" not in errors
