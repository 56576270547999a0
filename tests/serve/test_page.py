"""The live page: there only where it was asked for, and it shows every segment, erased ones too."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from e3rl.errors import UserError
from e3rl.serve.server import make_server
from e3rl.serve.service import Service
from e3rl.web.access import Access
from tests.serve.conftest import serving
from tests.serve.test_server import TEXT, TOKEN, post

ERASING = {"e3rl": {"baseline": "static", "static_baseline": 4.5, "return_erased": True}}


def watch(url: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("GET", "/live")
    answer = connection.getresponse()
    assert answer.readline() == b": watching\n"
    assert answer.readline() == b"\n"
    return answer


def events(answer: http.client.HTTPResponse, count: int) -> list[dict[str, Any]]:
    found = []
    while len(found) < count:
        line = answer.readline().decode()
        if line.startswith("data: "):
            found.append(json.loads(line.removeprefix("data: ")))
    return found


def test_it_shows_what_was_kept_and_what_was_erased(make_service: Callable[..., Service]):
    with serving(make_service(live=True)) as url:
        watching = watch(url)
        status, answer = post(url, TEXT, {"model": "tiny", "prompt": "3", "seed": 2, **ERASING})
        assert status == 200
        (choice,) = answer["choices"]
        told = choice["e3rl"]
        assert told["erasures"] > 0
        seen = events(watching, told["segments"] + told["erasures"])
        assert "".join(e["text"] for e in seen if not e["erased"]) == choice["text"]
        assert [e["u"] for e in seen if e["erased"]] == [round(e["uncertainty"], 4) for e in told["erased"]]
        assert all(e["u"] > e["threshold"] for e in seen if e["erased"])
        assert events(watch(url), len(seen)) == seen  # who comes later sees it as well
        with urllib.request.urlopen(f"{url}/", timeout=30) as page:
            assert "default-src 'none'" in page.headers["Content-Security-Policy"]
            assert 'new EventSource("live")' in page.read().decode()


def test_viewers_are_limited_and_one_that_leaves_makes_room(make_service: Callable[..., Service]):
    service = make_service(live=True)
    with serving(service) as url:
        watching = [watch(url) for _ in range(16)]
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}/live", timeout=30)
        assert refused.value.code == 429
        watching.pop().close()
        post(url, TEXT, {"model": "tiny", "prompt": "3", "max_tokens": 4, "e3rl": {"erase": False}})
        for _ in range(100):
            if len(service.live._viewers) < 16:
                break
            post(url, "/tokenize", {"prompt": "1"})
        watch(url)


def test_it_is_not_there_unless_it_was_asked_for(make_service: Callable[..., Service]):
    with serving(make_service()) as url:
        assert post(url, "/", b"", method="GET")[0] == 404
        assert post(url, "/live", b"", method="GET")[0] == 404
    with pytest.raises(UserError, match="without --token"):
        make_server(make_service(live=True), Access("127.0.0.1", TOKEN), 0)
