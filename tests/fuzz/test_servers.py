"""Whatever is sent to the servers, they answer it or hang up, and answer the next request as ever."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.config import load_config
from e3rl.models import load_policy
from e3rl.report.server import make_server
from e3rl.serve.service import Service
from e3rl.web.access import Access
from tests.fuzz.cases import fuzzed, long
from tests.report.builder import SyntheticRun
from tests.serve.conftest import SETTINGS, serving
from tests.train.random_lab import random_lab
from tests.web.running import raw, running

PATHS = (
    "/",
    "/api/runs",
    "/api/runs/0/steps/1",
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/inference/v1/generate",
    "/tokenize",
    "/detokenize",
    "/metrics",
    "*",
    "/../..",
)
HEADERS = (
    b"Host: 127.0.0.1", b"Host: evil.example", b"Host:", b"Content-Length: 5", b"Content-Length: -1", b"Cookie: a=\"",
    b"Content-Length: 99999999999999999999", b"Content-Type: application/json", b"Transfer-Encoding: chunked",
    b"Authorization: Bearer \xff", b"Expect: 100-continue", b"X: " + b"a" * 70_000, b"no colon", b"Connection: upgrade",
)  # fmt: skip
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
_FIELDS = (
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "n",
    "stop",
    "stream",
    "temperature",
    "top_p",
    "seed",
    "e3rl",
    "x",
    "tools",
    "tool_choice",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "structured_outputs",
    "response_format",
    "chat_template_kwargs",
    "sampling_params",
    "token_ids",
    "tokens",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "return_token_ids",
)
BODIES = st.binary(max_size=60) | st.dictionaries(st.sampled_from(_FIELDS), _VALUES, max_size=6).map(
    lambda body: json.dumps({"model": "tiny", "max_tokens": 2, **body}).encode()
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Bytes that are nearly a request, or nothing like one."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.binary(max_size=300))
    method = draw(st.sampled_from((b"GET", b"POST", b"HEAD", b"OPTIONS", b"TRACE", b"get", b"\x16\x03\x01")))
    path = draw(st.sampled_from(PATHS)).encode() + draw(st.binary(max_size=6))
    body = draw(BODIES)
    lines = [method + b" " + path + b" HTTP/1.1", *draw(st.lists(st.sampled_from(HEADERS), max_size=4))]
    lines += draw(st.sampled_from(([], [b"Host: 127.0.0.1", b"Content-Type: application/json"])))
    lines += [b"Content-Length: %d" % len(body)] * draw(st.booleans())
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def healthy(port: int, path: str) -> bool:
    """Whether an ordinary request is answered as ever."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status == 200


@pytest.fixture(scope="module")
def view_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    run = SyntheticRun(tmp_path_factory.mktemp("runs") / "demo").go(1).path
    with running(make_server([run], Access("127.0.0.1"), 0)) as server:
        yield server.port


@pytest.fixture(scope="module")
def serve_port() -> Iterator[int]:
    config = load_config(None, [], [*SETTINGS, "erasure.baseline=static", f"model.path={random_lab()}"])
    service = Service(load_policy(config.model), config, None, name="tiny", max_length=64, queue_limit=8)
    with serving(service) as address:
        yield int(address.rpartition(":")[2])
    service.close()


@long
@given(request_bytes=requests())
@fuzzed
def test_the_view_server_outlives_any_bytes(view_port: int, request_bytes: bytes):
    answer = raw(view_port, request_bytes)
    assert not answer.startswith(b"HTTP/1.1 500")
    assert b"Traceback" not in answer
    assert healthy(view_port, "/api/runs")


@long
@given(request_bytes=requests())
@fuzzed
def test_the_decoding_server_outlives_any_bytes(serve_port: int, request_bytes: bytes):
    answer = raw(serve_port, request_bytes)
    assert not answer.startswith(b"HTTP/1.1 500"), answer
    assert b"Traceback" not in answer
    assert healthy(serve_port, "/v1/models")


def test_both_run(view_port: int, serve_port: int, tmp_path: Path):
    assert healthy(view_port, "/")
    assert healthy(serve_port, "/v1/models")
