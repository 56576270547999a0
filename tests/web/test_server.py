"""The servers' common base under slow, silent, greedy and vanishing clients. Deadlines are shortened, behaviour is not."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from e3rl.errors import UserError
from e3rl.web.access import Access, network
from e3rl.web.door import Door, while_connected
from e3rl.web.server import WebServer
from tests.web.running import running

TOKEN = "a-token-of-some-length"
LARGEST = 2**20
GET = b"GET /echo HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n\r\n" % TOKEN.encode()


class App:
    """/echo sends the body back, /wait waits until the client has gone, /flood sends without end."""

    def __init__(self) -> None:
        self.bodies: list[int] = []
        self.gone, self.waiting, self.stopping = threading.Event(), threading.Event(), threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        self.bodies.append(len(body))
        if scope["path"] == "/echo":
            await PlainTextResponse(body or b"ok")(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        self.waiting.set()
        try:
            await while_connected(receive, self._flood(send) if scope["path"] == "/flood" else self._wait())
        finally:
            self.gone.set()
        await send({"type": "http.response.body", "body": b"end", "more_body": False})

    async def _wait(self) -> None:
        while not self.stopping.is_set():
            await asyncio.sleep(0.01)

    async def _flood(self, send: Send) -> None:
        while True:
            await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
            await asyncio.sleep(0)


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def port(app: App) -> Iterator[int]:
    with listening(app, LARGEST) as port:
        yield port


@contextlib.contextmanager
def listening(app: App, largest: int) -> Iterator[int]:
    access = Access("127.0.0.1", TOKEN)

    def admit(request: Request) -> Response | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        return None if access.admits(token) else PlainTextResponse("no", 401)

    def refuse(status: int, message: str) -> Response:
        return PlainTextResponse(message, status)

    door = Door(app, admit=admit, refuse=refuse, largest=largest, budget=LARGEST)
    with running(WebServer(door, access, 0, on_stop=app.stopping.set)) as server:
        yield server.port


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this machine count as several."""
    for module in ("door", "server"):
        monkeypatch.setattr(f"e3rl.web.{module}.network", lambda host: host)


OTHER = "127.0.0.2"


@contextlib.contextmanager
def line(port: int, *sent: bytes, own: str = "127.0.0.1") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=10, source_address=(own, 0)) as connection:
        for part in sent:
            connection.sendall(part)
            time.sleep(0.02 * (len(sent) > 1))
        yield connection


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server hangs up."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


def answer_of(connection: socket.socket, ending: bytes = b"\r\n\r\nok") -> bytes:
    """An answer on a connection that stays open."""
    received = b""
    while not received.endswith(ending):
        chunk = connection.recv(65536)
        assert chunk, received
        received += chunk
    return received


def head(path: str, length: int | None, token: str = TOKEN) -> bytes:
    said = "" if length is None else f"Content-Length: {length}\r\n"
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n{said}\r\n".encode()


def status(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/echo", headers={"Authorization": f"Bearer {TOKEN}"})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def test_a_connection_answers_several_requests_in_their_order(port: int):
    with line(port, head("/echo", 3) + b"one" + head("/echo", 3) + b"two" + head("/echo", 5)) as connection:
        connection.sendall(b"three")
        received = b""
        while b"three" not in received:
            received += connection.recv(65536)
    assert [received.index(word) for word in (b"one", b"two", b"three")] == sorted(
        received.index(word) for word in (b"one", b"two", b"three")
    )


@pytest.mark.parametrize("drip", [b"", b"x"], ids=["silent", "a byte now and then"])
def test_headers_that_do_not_arrive_end_the_connection(port: int, monkeypatch: pytest.MonkeyPatch, drip: bytes):
    monkeypatch.setattr("e3rl.web.server.SECONDS_TO_ASK", 0.3)
    began = time.monotonic()
    with line(port, b"GET /echo HTTP/1.1\r\nX: ") as connection:
        connection.settimeout(0.05)
        while time.monotonic() < began + 5:
            with contextlib.suppress(TimeoutError):
                try:
                    connection.sendall(drip)
                    if connection.recv(100) == b"":
                        break
                except ConnectionError:
                    break
    assert time.monotonic() < began + 2


def test_the_next_request_on_a_connection_has_the_same_deadline(port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("e3rl.web.server.SECONDS_TO_ASK", 0.3)
    with line(port, GET) as connection:
        answer_of(connection)
        connection.sendall(b"GET /echo")
        began = time.monotonic()
        assert rest(connection) == b""
        assert time.monotonic() < began + 2


def test_no_byte_of_a_body_is_read_before_the_token(app: App, port: int):
    with line(port, head("/echo", LARGEST, "another-token-entirely")) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")  # and nothing of the body was sent
    with line(port, head("/echo", LARGEST, "another-token-entirely"), b"x" * LARGEST) as connection:
        assert rest(connection).startswith(b"HTTP/1.1 401")  # not lost in a reset
    assert app.bodies == []


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (head("/echo", LARGEST + 1) + b"x" * (LARGEST + 1), b"413"),
        (head("/echo", 2**60), b"413"),
        (head("/echo", None), b"411"),
        (head("/echo", None)[:-2] + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", b"411"),
    ],
    ids=["too long", "endless", "no length", "chunked"],
)
def test_bodies_have_a_limit(app: App, port: int, request_bytes: bytes, expected: bytes):
    with line(port) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(request_bytes)
        assert connection.recv(65536).split(b" ")[1] == expected
    assert app.bodies == []
    assert status(port) == 200


def test_a_body_that_does_not_arrive_is_refused_in_time(app: App, port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("e3rl.web.door.SECONDS_TO_SEND", 0.3)
    with line(port, head("/echo", 10), b"x") as connection:
        assert rest(connection).startswith(b"HTTP/1.1 408")
    assert app.bodies == []


def test_bodies_at_one_time_have_a_limit_together(port: int):
    half = LARGEST // 2 + 1
    with line(port, head("/echo", half), b"x" * (half - 1)) as first, line(port, head("/echo", half)) as second:
        time.sleep(0.2)
        second.sendall(b"x" * half)
        assert second.recv(65536).startswith(b"HTTP/1.1 503")
        first.sendall(b"x")
        assert first.recv(65536).startswith(b"HTTP/1.1 200")
    assert status(port) == 200


def test_bodies_that_take_all_room_leave_room_for_small_ones(port: int):
    with line(port, head("/echo", LARGEST), b"x" * (LARGEST - 1)):
        time.sleep(0.2)
        with line(port, head("/echo", 5) + b"hello") as small:
            assert answer_of(small, b"hello").startswith(b"HTTP/1.1 200")


def test_bodies_of_one_address_leave_room_for_those_of_another(app: App, addresses: None):
    largest = LARGEST // 5
    with listening(app, largest) as port, contextlib.ExitStack() as stack:
        lines = [stack.enter_context(line(port, head("/echo", largest), b"x" * (largest - 1))) for _ in range(3)]
        time.sleep(0.2)
        with line(port, head("/echo", largest), b"x" * (largest - 1)) as more:
            assert more.recv(65536).startswith(b"HTTP/1.1 503")
        with line(port, head("/echo", largest), b"y" * largest, own=OTHER) as other:
            assert answer_of(other, b"y" * largest).startswith(b"HTTP/1.1 200")
        lines[0].sendall(b"x")
        answer_of(lines[0], b"x" * largest)  # and what was read is given back
        with line(port, head("/echo", largest), b"x" * largest) as again:
            assert answer_of(again, b"x" * largest).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "silent",
    [b"", b"GET /echo HTTP/1.1\r\n", head("/echo", 100, "another-token-entirely"), head("/echo", 100) + b"x"],
    ids=["nothing", "half a head", "a wrong token", "half a body"],
)
def test_connections_that_ask_nothing_lock_nobody_out(
    app: App, port: int, monkeypatch: pytest.MonkeyPatch, silent: bytes
):
    monkeypatch.setattr("e3rl.web.server.CONNECTIONS", 8)
    with contextlib.ExitStack() as stack:
        waiting = stack.enter_context(line(port, head("/wait", 0)))
        assert app.waiting.wait(5)
        kept = stack.enter_context(line(port, GET))
        answer_of(kept)
        for _ in range(40):
            stack.enter_context(line(port, silent))
        assert status(port) == 200
        kept.sendall(GET)
        answer_of(kept)  # one that was admitted before is closed after those that never were
        app.stopping.set()
        answer_of(waiting, b"end\r\n0\r\n\r\n")  # and one in the middle of its answer never


def test_where_every_connection_is_at_work_a_new_one_is_told_so(
    app: App, port: int, addresses: None, monkeypatch: pytest.MonkeyPatch
):
    """Three quarters of them may be of one address."""
    monkeypatch.setattr("e3rl.web.server.CONNECTIONS", 4)

    def told(own: str) -> bool:
        with line(port, own=own) as connection:
            answer = rest(connection)
        return answer.startswith(b"HTTP/1.1 503") and b"Retry-After" in answer

    with contextlib.ExitStack() as stack:
        for own in ("127.0.0.1", "127.0.0.1", "127.0.0.1", OTHER):
            assert own != OTHER or told("127.0.0.1")
            app.waiting.clear()
            stack.enter_context(line(port, head("/wait", 0), own=own))
            assert app.waiting.wait(5)
        assert told(OTHER)
        app.stopping.set()


def test_whoever_has_one_address_has_those_beside_it():
    assert network("2001:db8:1:2:3::4") == network("2001:db8:1:2::") == "2001:db8:1:2::/64"
    assert network("2001:db8:1:3::") == "2001:db8:1:3::/64"
    assert network("::ffff:10.0.0.1") == network("10.0.0.1") == "10.0.0.1"
    assert network("::ffff:127.0.0.9") == network("127.1.2.3") == network("::1") == "localhost"
    assert (network(""), network("testclient")) == ("", "testclient")


def test_two_hundred_at_once_are_all_answered(port: int):
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(line(port)) for _ in range(200)]
        for connection in lines:
            connection.sendall(GET)
        assert [connection.recv(65536)[:12] for connection in lines] == [b"HTTP/1.1 200"] * 200


def _close(connection: socket.socket) -> None:
    connection.close()


def _send_and_close(connection: socket.socket) -> None:
    connection.sendall(b"x")
    time.sleep(0.05)
    connection.close()


def _half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("leave", [_close, _send_and_close, _half_close])
@pytest.mark.parametrize("after", [b"", b"\r\n"], ids=["", "a byte too many"])
def test_a_client_that_leaves_is_noticed_at_once(
    app: App, port: int, leave: Callable[[socket.socket], None], after: bytes
):
    with line(port, head("/wait", 2) + b"{}" + after) as connection:
        assert app.waiting.wait(5)
        began = time.monotonic()
        leave(connection)
        assert app.gone.wait(5)
        assert time.monotonic() - began < 1


def test_who_only_stops_sending_is_answered(port: int):
    for _ in range(20):  # the end may arrive before the request is looked at, or after
        with line(port, head("/echo", 5) + b"hello") as connection:
            connection.shutdown(socket.SHUT_WR)
            assert rest(connection).endswith(b"hello")


def test_a_client_that_does_not_read_is_cut_off(app: App, port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("e3rl.web.server.SECONDS_TO_READ", 0.3)
    with line(port, head("/flood", 0)):
        assert app.gone.wait(5)


def test_more_than_a_little_before_the_answer_ends_the_connection(app: App, port: int):
    with line(port, head("/wait", 0)) as connection:
        assert app.waiting.wait(5)
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                connection.sendall(b"x" * 2**16)
        assert app.gone.wait(5)


def test_stopping_ends_what_waits(app: App):
    served = WebServer(app, Access("127.0.0.1"), 0, on_stop=app.stopping.set)
    with running(served) as server, line(server.port, head("/wait", 0)) as connection:
        assert app.waiting.wait(5)
        server.stop()
        assert rest(connection).endswith(b"end\r\n0\r\n\r\n")


def test_a_port_that_is_taken_is_a_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"can't listen on 127.0.0.1 port {number}: .*0 takes any free one"):
            WebServer(App(), Access("127.0.0.1"), number)
