"""One request's failure is its own: what a client sends, or what goes wrong in its group, changes nobody else's stream."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from e3rl.rollout.group import GroupRollout
from e3rl.serve.server import READERS
from e3rl.serve.service import Service
from e3rl.serve.settings import _ERASURE
from e3rl.types import Draw
from tests.serve.conftest import serving
from tests.serve.test_server import TEXT, post, settled

VICTIM = {"model": "tiny", "prompt": "3", "n": 2, "seed": 9, "max_tokens": 60, "e3rl": {"segment_length": 4}}
SHAPING = (
    *("min_p", "top_k", "min_tokens", "logprobs"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty"),
)
EDGES = ("1e6", "-1e6", "1e-6", "10", "0", "5e-324")
EXTREMES = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e308", "-1e308", "1" + "0" * 30, "1" + "0" * 400)


def raw(field: str, number: str, *, extension: bool) -> bytes:
    """A request with one number as it stands, which may be more than JSON or a float can hold."""
    where = f'"e3rl": {{"{field}": {number}}}' if extension else f'"{field}": {number}'
    return f'{{"model": "tiny", "prompt": "3", "n": 2, "max_tokens": 12, {where}}}'.encode()


@pytest.mark.parametrize(
    ("field", "number", "extension", "words"),
    [
        ("kappa0", "NaN", True, "e3rl.kappa0: must be from -1e+06 to 1e+06"),
        ("kappa0", "1e999", True, "e3rl.kappa0: must be from -1e+06 to 1e+06"),
        ("temperature", "1e-320", False, "temperature: must be 0, or a number from 1e-06 to 2"),
        ("temperature", "1" + "0" * 400, False, "temperature: must be a number from 0 to 2"),
        ("top_p", "NaN", False, "top_p: must be a number from 0 to 1"),
        ("top_k", "1" + "0" * 29, True, "e3rl.top_k: must be from 0 to 1e+06"),
        ("entropy_temperature", "1e-320", True, "e3rl.entropy_temperature: must be 0, or from 1e-06"),
        ("sigma0", "1e-320", True, "e3rl.sigma0: must be from 1e-06 to 1e+06"),
        ("delta", "400", True, "e3rl.delta: must be from 1e-06 to 10"),
    ],
)
def test_a_number_that_can_not_be_calculated_with_is_refused(
    make_service: Callable[..., Service], field: str, number: str, extension: bool, words: str
):
    with serving(make_service()) as url:
        status, answer = post(url, TEXT, raw(field, number, extension=extension))
        assert status == 400
        assert words in answer["error"]["message"]
        assert answer["error"]["param"] == ("e3rl." * extension + field)


def test_no_extreme_number_reaches_a_neighbour(make_service: Callable[..., Service]):
    """Every number that a client may send, at every extreme, beside a stream that must stay as it is alone."""
    fields = [(name, True) for name in (*_ERASURE, "top_k", "segment_length")]
    fields += [(name, False) for name in ("temperature", "top_p", "n", "max_tokens", "seed", "stop", *SHAPING)]
    with serving(make_service()) as url:
        alone = post(url, TEXT, VICTIM)[1]["choices"]
        found: list[Any] = []
        done = threading.Event()

        def victim() -> None:
            while not done.is_set():
                found.append(post(url, TEXT, VICTIM))

        thread = threading.Thread(target=victim)
        thread.start()
        try:
            statuses = {
                (field, number): post(url, TEXT, raw(field, number, extension=extension))[0]
                for field, extension in fields
                for number in (*EXTREMES, *EDGES)
            }
        finally:
            done.set()
            thread.join()
    assert {k: s for k, s in statuses.items() if s not in (200, 400)} == {}
    assert {number for (_, number), s in statuses.items() if s == 200} <= set(EDGES)
    assert found
    assert all(status == 200 and answer["choices"] == alone for status, answer in found)


def together(url: str, *bodies: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    answers: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i, b=b: answers.update({i: post(url, TEXT, b)})) for i, b in enumerate(bodies)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[i] for i in range(len(bodies))]


def test_what_breaks_in_one_group_breaks_nothing_else(make_service: Callable[..., Service], monkeypatch):
    service, deliver = make_service(), GroupRollout.deliver

    def sometimes(self: GroupRollout, number: int, candidate: Any) -> Any:
        if self._config.num_generations == 3 and candidate:
            raise OverflowError("math range error")
        return deliver(self, number, candidate)

    with serving(service) as url:
        alone = post(url, TEXT, VICTIM)[1]["choices"]
        monkeypatch.setattr(GroupRollout, "deliver", sometimes)
        (status, broken), victim = together(url, {**VICTIM, "n": 3}, VICTIM)
        assert (status, broken["error"]["message"]) == (500, "decoding failed: OverflowError")
        assert (victim[0], victim[1]["choices"]) == (200, alone)
        assert settled(service)


def test_an_order_that_the_engine_refuses_fails_its_own_group(make_service: Callable[..., Service], monkeypatch):
    service = make_service()
    extend = service._engine.extend

    def refusing(row: Any, tokens: int, draw: Draw, sampling: Any) -> None:
        if draw.seed == 13 and draw.sibling == 1:
            raise RuntimeError("secret")
        extend(row, tokens, draw, sampling)

    monkeypatch.setattr(service._engine, "extend", refusing)
    with serving(service) as url:
        alone = post(url, TEXT, VICTIM)[1]["choices"]
        (status, broken), victim = together(url, {**VICTIM, "seed": 13}, VICTIM)
        assert (status, broken["error"]["message"]) == (500, "decoding failed: RuntimeError")
        assert (victim[0], victim[1]["choices"]) == (200, alone)
        assert settled(service)


@pytest.mark.parametrize("where", ["prefill_together", "decode"])
def test_non_finite_logits_fail_the_group_that_they_belong_to(
    make_service: Callable[..., Service], monkeypatch, where: str
):
    """Both clients have the same seed, so their draws are equal; only the long prompt gets NaN."""
    service, far = make_service(), 150
    model = service._engine._slot_model
    prefill, decode = model.prefill_together, model.decode

    def broken_prefill(prompts: Any) -> Any:
        found = zip(prompts, prefill(prompts), strict=True)
        return [logits_V * math.nan if len(ids) >= far else logits_V for (ids, _), logits_V in found]

    def broken_decode(rows: Any) -> Any:
        return decode(rows).masked_fill((rows.positions_R >= far + 9).unsqueeze(1), math.nan)

    with serving(service) as url:
        alone = post(url, TEXT, VICTIM)[1]["choices"]
        monkeypatch.setattr(model, where, broken_prefill if where == "prefill_together" else broken_decode)
        (status, broken), victim = together(url, {**VICTIM, "prompt": [1] * far}, VICTIM)
        assert (status, "NaN" in broken["error"]["message"]) == (500, True)
        assert (victim[0], victim[1]["choices"]) == (200, alone)
        assert settled(service)


def test_a_threshold_without_end_is_null_in_json(make_service: Callable[..., Service]):
    body = {
        **VICTIM,
        "e3rl": {"eta": 10.0, "delta": 10.0, "baseline": "static", "static_baseline": 0.01, "return_erased": True},
    }
    with serving(make_service()) as url:
        status, answer = post(url, TEXT, body)
    assert status == 200
    assert "Infinity" not in json.dumps(answer)


DEEP = 4000
NASTY = {
    "a schema without end": {"structured_outputs": {"json": {"$ref": "#"}}},
    "a regular expression of a million": {"structured_outputs": {"regex": "((a{1,100}){1,100}){1,100}b"}},
    "a rule that never ends": {"structured_outputs": {"grammar": "start: ( /x*/ start start + )"}},
    "alternatives that repeat": {"structured_outputs": {"regex": "(a|a?)+" * 50 + "b"}},
    "a grammar that calls itself": {"structured_outputs": {"grammar": "start: start start | start"}},
    "many choices": {"structured_outputs": {"choice": [f"{i:04}" for i in range(6000)]}},
    "a template's loop": {"chat_template_kwargs": {"messages": [1], "bos_token": "x" * 10_000}},
}


@pytest.mark.parametrize("name", NASTY)
def test_nothing_nasty_reaches_a_neighbour(make_service: Callable[..., Service], name: str):
    """A grammar that takes long or can't be met ends its own request, in time, and a neighbour's answer is as ever."""
    with serving(make_service()) as url:
        alone = post(url, TEXT, VICTIM)[1]["choices"]
        body: dict[str, Any] = {**VICTIM, "max_tokens": 12, **NASTY[name]}
        if "chat_template_kwargs" in body:
            body = {**body, "messages": [{"role": "user", "content": "1"}]}
            del body["prompt"]
        began = time.monotonic()
        path = "/v1/chat/completions" if "messages" in body else TEXT
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(post(url, path, body)))
        thread.start()
        victim = post(url, TEXT, VICTIM)
        thread.join()
        assert (victim[0], victim[1]["choices"]) == (200, alone)
        assert answers[0][0] in (200, 400), answers
        assert time.monotonic() - began < 60


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_what_is_nested_too_deeply_is_refused(make_service: Callable[..., Service], path: str):
    deep = "[" * DEEP + "]" * DEEP
    tool = f'{{"type": "function", "function": {{"name": "f", "parameters": {{"x": {deep}}}}}}}'
    body = f'{{"model": "tiny", "messages": [{{"role": "user", "content": "1"}}], "tools": [{tool}]}}'
    with serving(make_service()) as url:
        status, answer = post(url, path, body.encode())
    assert status == 400
    assert answer["error"]["message"]


def test_texts_that_take_long_to_read_hold_up_nobody_elses(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
):
    """Of the threads that read requests an address has half."""
    service, over, reading = make_service(), threading.Event(), list[str]()
    encode = service.encode

    def slowly(prompt: Any, *rest: Any) -> Any:
        if prompt == "long":
            reading.append(prompt)
            over.wait(60)
        return encode(prompt, *rest)

    monkeypatch.setattr(service, "encode", slowly)
    monkeypatch.setattr("e3rl.serve.server.network", lambda host: host)
    with serving(service) as url, ThreadPoolExecutor(20) as threads:
        port = int(url.rpartition(":")[2])

        def ask(own: str, prompt: str, path: str = TEXT) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60, source_address=(own, 0))
            body = {"model": "tiny", "prompt": prompt, **({"max_tokens": 4} if path == TEXT else {})}
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            with contextlib.closing(connection):
                return connection.getresponse().status

        try:
            waiting = [threads.submit(ask, "127.0.0.1", "long", path) for path in (TEXT, "/tokenize") * 10]
            while len(reading) < READERS // 2:
                time.sleep(0.01)
            assert ask("127.0.0.2", "3") == 200
            assert len(reading) == READERS // 2
        finally:
            over.set()
        assert {found.result() for found in waiting} <= {200, 429}
