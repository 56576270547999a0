"""`judge` against an endpoint that answers, refuses, stalls, breaks off and talks nonsense."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from e3rl.config import RewardsConfig
from e3rl.errors import UserError
from e3rl.rewards.scorer import Scorer
from e3rl.types import Problem, Prompt, Reward
from tests.rewards.build import trajectory


class Endpoint(ThreadingHTTPServer):
    """Answers by what stands in the response: a text, or (status, headers, text), or seconds to stall."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: dict[str, list[Any]] = {}
        self.asked: list[tuple[float, dict[str, Any], str | None]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((time.monotonic(), body, self.headers.get("Authorization")))
        shown = body["messages"][1]["content"]
        answers = next(a for key, a in self.server.script.items() if key in shown)
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, float):
            time.sleep(answer)
            answer = "Score: 1"
        status, headers, text = answer if isinstance(answer, tuple) else (200, {}, answer)
        content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        if text == "broken":
            content = b"{"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def judged(endpoint: Endpoint, *texts: str, scorer: Scorer | None = None, **settings: Any) -> list[Reward]:
    table = {"url": f"http://127.0.0.1:{endpoint.server_port}/v1", "model": "m", "wait": 0.01, **settings}
    config = RewardsConfig(functions=("judge",), judge=table)
    given = [replace(trajectory(), prompt=Prompt(Problem(str(i), "What?", "42"), (1,))) for i in range(len(texts))]
    if scorer is not None:
        return scorer.score(given, list(texts))
    with Scorer(config) as made:
        return made.score(given, list(texts))


def test_the_last_score_counts_and_the_rubric_and_key_are_sent(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    endpoint.script = {"fine": ["Score: 2, no: it is right.\n**Score: 7.5**"], "poor": ["score = 0"]}
    rewards = judged(endpoint, "fine", "poor", rubric="Be strict.", key_variable="JUDGE_KEY")
    assert [r.value for r in rewards] == [0.75, 0.0]
    _, body, key = next(a for a in endpoint.asked if "fine" in a[1]["messages"][1]["content"])
    assert (body["model"], body["messages"][0]["content"], key) == ("m", "Be strict.", "Bearer secret")
    assert all(part in body["messages"][1]["content"] for part in ("What?", "42", "fine"))


@pytest.mark.parametrize(
    ("answers", "value", "requests"),
    [
        ([(429, {}, ""), (503, {}, ""), "Score: 5"], 0.5, 3),
        (["broken", "Score: 5"], 0.5, 2),
        ([1.0, "Score: 5"], 0.5, 2),
        ([(500, {}, "")], "could not be reached in 3 tries (HTTP 500)", 3),
        ([(401, {}, "")], "refused (HTTP 401)", 1),
        (["Score: 11"], "gave 11, and scores go from 0 to 10", 1),
        (["Score: -1"], "gave -1", 1),
        (["I like it."], "gave no score: 'I like it.'", 1),
    ],
)
def test_retries_and_what_is_missing(endpoint: Endpoint, answers: list[Any], value: Any, requests: int):
    endpoint.script = {"it": answers}
    [reward] = judged(endpoint, "it", retries=2, timeout=0.4)
    assert len(endpoint.asked) == requests
    if isinstance(value, float):
        assert reward.value == value
    else:
        assert reward.value is None
        assert value in str(reward.error)


def test_it_waits_as_long_as_it_is_told(endpoint: Endpoint):
    endpoint.script = {"it": [(429, {"Retry-After": "0.3"}, ""), "Score: 5"]}
    assert judged(endpoint, "it")[0].value == 0.5
    (first, _, _), (second, _, _) = endpoint.asked
    assert second - first >= 0.3


def test_equal_questions_are_asked_once_and_requests_have_a_limit(endpoint: Endpoint):
    endpoint.script = {"alpha": ["Score: 1"], "bravo": ["Score: 2"], "carol": ["Score: 3"]}
    table = {"url": f"http://127.0.0.1:{endpoint.server_port}/v1", "model": "m", "max_requests": 2, "together": 1}
    with Scorer(RewardsConfig(functions=("judge",), judge=table)) as scorer:
        assert [r.value for r in judged(endpoint, "alpha", "alpha", "bravo", scorer=scorer)] == [0.1, 0.1, 0.2]
        again = judged(endpoint, "bravo", "carol", scorer=scorer)
    assert [r.value for r in again] == [0.2, None]
    assert "asked 2 times already" in str(again[1].error)
    assert len(endpoint.asked) == 2


def test_the_rate_is_kept(endpoint: Endpoint):
    endpoint.script = {"": ["Score: 1"]}
    judged(endpoint, "a", "b", "c", per_minute=600)
    times = sorted(t for t, _, _ in endpoint.asked)
    assert times[2] - times[0] >= 0.15


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({}, "which model is to judge"),
        ({"model": "m", "url": "file:///etc/passwd"}, "no http address"),
        ({"model": "m", "modle": 1}, "modle"),
        ({"model": "m", "best": 0}, "rewards.judge.best"),
    ],
)
def test_settings_that_cannot_work_are_refused(table: dict[str, Any], why: str):
    with pytest.raises(UserError, match=why):
        Scorer(RewardsConfig(functions=("judge",), judge=table))
