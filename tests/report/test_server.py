"""The server answers those it should, with what it should, and outlives those who send nonsense."""

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from e3rl.errors import UserError
from e3rl.report.server import Site, make_server
from e3rl.web.access import Access
from tests.report.builder import SyntheticRun
from tests.web.running import raw, running

TOKEN = "a-token-of-24-characters"
LOOPBACK = Access("127.0.0.1")
LOCAL = {"host": "127.0.0.1:8000"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SyntheticRun:
    return SyntheticRun(tmp_path_factory.mktemp("runs") / "demo").go(2)


@contextlib.contextmanager
def serving(run: Path, token: str | None = None) -> Iterator[int]:
    with running(make_server([run], Access("127.0.0.1", token), 0)) as server:
        yield server.port


@pytest.fixture(scope="module")
def port(run: SyntheticRun) -> Iterator[int]:
    with serving(run.path) as number:
        yield number


def get(port: int, path: str, headers: dict[str, str] | None = None) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers=headers or {})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body, answer.headers


def test_the_page_comes_with_its_policy(port: int) -> None:
    status, body, headers = get(port, "/")
    assert status == 200
    assert "Content-Security-Policy" in body
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"


def test_runs_are_told_once_and_again_only_when_they_changed(tmp_path: Path) -> None:
    made = SyntheticRun(tmp_path / "live").go(1)
    site = Site((made.path,), LOOPBACK)
    first = json.loads(site.answer("/api/runs", LOCAL).body)
    assert first["runs"][0]["step"] == 1
    assert site.answer(f"/api/runs?since={first['version']}", LOCAL).status_code == 204
    made.step()
    second = json.loads(site.answer(f"/api/runs?since={first['version']}", LOCAL).body)
    assert (second["runs"][0]["step"], second["version"] != first["version"]) == (2, True)


def test_a_steps_rollouts(port: int) -> None:
    status, body, _ = get(port, "/api/runs/0/steps/2")
    assert (status, json.loads(body)["step"]) == (200, 2)


@pytest.mark.parametrize(
    "path",
    [
        "/api/runs/1/steps/1",
        "/api/runs/0/steps/99",
        "/api/runs/-1/steps/1",
        "/api/runs/0/steps/99999999999999999999",
        "/api/runs/0/steps/²",
        "/api/runs/0/steps/../../config.toml",
        "/../config.toml",
        "/%2e%2e/config.toml",
        "//etc/passwd",
        "/config.toml",
        "/rollouts/step-000001.parquet",
        "/api/runs/0",
    ],
)
def test_nothing_but_the_api_has_an_address(run: SyntheticRun, path: str) -> None:
    answer = Site((run.path,), LOOPBACK).answer(path, LOCAL)
    assert (answer.status_code, answer.body) in (
        (404, b"There is no such page."),
        (404, b"There are no such rollouts."),
    )


@pytest.mark.parametrize("path", ["/../config.toml", "/..%2fconfig.toml", "/api/runs/0/steps/..%2f..%2fconfig.toml"])
def test_no_path_leads_out(port: int, path: str) -> None:
    assert raw(port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()).startswith(b"HTTP/1.1 404")


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:80", "LOCALHOST"])
def test_names_of_this_machine_are_answered(run: SyntheticRun, host: str) -> None:
    assert Site((run.path,), LOOPBACK).answer("/api/runs", {"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "", "10.0.0.5", "localhost@evil", "[::1", "x y"]
)
def test_other_names_are_not(run: SyntheticRun, host: str) -> None:
    assert Site((run.path,), LOOPBACK).answer("/api/runs", {"host": host}).status_code == 421


def test_a_request_without_host_is_refused(port: int) -> None:
    assert raw(port, b"GET /api/runs HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 421")


def test_an_open_address_is_answered_by_address_but_not_by_any_name(run: SyntheticRun) -> None:
    site = Site((run.path,), Access("0.0.0.0", TOKEN))
    bearer = {"authorization": f"Bearer {TOKEN}"}
    assert site.answer("/api/runs", bearer | {"host": "10.0.0.5:8000"}).status_code == 200
    assert site.answer("/api/runs", bearer | {"host": socket.gethostname()}).status_code == 200
    assert site.answer("/api/runs", bearer | {"host": "evil.example"}).status_code == 421


def test_the_token_opens_the_door_once_and_a_cookie_from_then_on(run: SyntheticRun) -> None:
    with serving(run.path, TOKEN) as port:
        assert get(port, "/")[0] == 403
        assert get(port, "/api/runs")[0] == 403
        assert get(port, "/api/runs/0/steps/1")[0] == 403
        assert get(port, "/?token=a-wrong-token-of-some-length")[0] == 403
        assert get(port, "/", {"Cookie": "e3rl=a-wrong-token-of-some-length"})[0] == 403
        status, _, headers = get(port, f"/?token={TOKEN}")
        assert (status, headers["Location"]) == (303, "/")
        assert "HttpOnly" in headers["Set-Cookie"]
        assert "SameSite=Strict" in headers["Set-Cookie"]
        assert get(port, "/api/runs", {"Cookie": headers["Set-Cookie"].split(";")[0]})[0] == 200
        assert get(port, "/api/runs", {"Authorization": f"Bearer {TOKEN}"})[0] == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x00\xff\xfe garbage\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 500 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET /api/runs HTTP/1.1\r\nHost: localhost\r\nCookie: \xff=;;=\x01\r\n\r\n",
        b"POST /api/runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\nx",
        b"DELETE / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"",
    ],
)
def test_nonsense_is_survived(port: int, request_bytes: bytes) -> None:
    answer = raw(port, request_bytes)
    assert b"Traceback" not in answer
    assert get(port, "/api/runs")[0] == 200


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"414"),
        (b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"405"),
    ],
)
def test_refusals_have_their_status(port: int, request_bytes: bytes, status: bytes) -> None:
    assert raw(port, request_bytes).split(b" ")[1] == status


def test_silent_connections_lock_nobody_out(run: SyntheticRun) -> None:
    with serving(run.path, TOKEN) as port, contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert get(port, "/api/runs", {"Authorization": f"Bearer {TOKEN}"})[0] == 200


def test_a_run_that_vanishes_is_a_sentence_not_a_crash(tmp_path: Path) -> None:
    made = SyntheticRun(tmp_path / "gone").go(1)
    with serving(made.path) as port:
        (made.path / "config.toml").unlink()
        status, body, _ = get(port, "/api/runs")
        assert (status, "no run directory" in body) == (500, True)


@pytest.mark.parametrize(
    ("host", "token", "message"),
    [
        ("0.0.0.0", None, "set a token"),
        ("example.org", None, "set a token"),
        ("0.0.0.0", "short", "at least 16"),
        ("127.0.0.1", "sixteen chars, but\r\nwith a header", "letters, digits"),
    ],
)
def test_what_would_be_unsafe_does_not_start(host: str, token: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Access(host, token)


def test_a_port_in_use_is_an_error_for_people(run: SyntheticRun, port: int) -> None:
    with pytest.raises(UserError, match=f"can't listen on 127.0.0.1 port {port}"):
        make_server([run.path], LOOPBACK, port)


def test_no_runs_and_no_run_directories_are_errors_for_people(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run to show"):
        make_server([], LOOPBACK, 0)
    with pytest.raises(UserError, match="no run directory"):
        make_server([tmp_path], LOOPBACK, 0)
