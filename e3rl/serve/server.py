"""HTTP around the service: sockets, headers, JSON and server-sent events.

It listens on this machine alone unless a token is set, answers only under its own name, and takes only JSON, so that
no web page can make a browser ask it.
"""

from __future__ import annotations

import functools
import json
import select
import socket
import sys
import traceback
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from e3rl.serve.access import Access
from e3rl.serve.errors import ApiError
from e3rl.serve.forms import FORMS, Form, Writer
from e3rl.serve.service import Gone, Running, Service
from e3rl.serve.sockets import Server, bind

MAX_BODY = 4 * 2**20
_SECONDS_TO_ASK = 10
_MAX_CONNECTIONS = 256
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Connection": "close",
}


def make_server(service: Service, access: Access, port: int) -> Server:
    """A server that is bound and not yet running; port 0 takes any free one."""
    return bind(access, port, functools.partial(_Handler, service, access), _MAX_CONNECTIONS)


class _Handler(BaseHTTPRequestHandler):
    timeout = _SECONDS_TO_ASK
    protocol_version = "HTTP/1.1"
    server_version = "e3rl"
    sys_version = ""

    def __init__(self, service: Service, access: Access, *args: Any) -> None:
        self.service, self.access = service, access
        super().__init__(*args)

    def do_GET(self) -> None:
        self._guarded(self._get)

    def do_POST(self) -> None:
        self._guarded(self._post)

    def _guarded(self, answer: Callable[[], None]) -> None:
        """Whatever goes wrong, the client gets an error object and never a traceback."""
        try:
            answer()
        except ApiError as error:
            self._send(error.status, error.body())
        except (Gone, OSError):
            pass
        except Exception:
            traceback.print_exc(file=sys.stderr)
            self._send(500, ApiError(500, "an internal error; the server's own output says more").body())

    def _get(self) -> None:
        self._check_caller()
        path = unquote(urlsplit(self.path).path)
        model = {"id": self.service.name, "object": "model", "created": 0, "owned_by": "e3rl"}
        if path == "/v1/models":
            self._send(200, {"object": "list", "data": [model]})
        elif path == f"/v1/models/{self.service.name}":
            self._send(200, model)
        elif path == "/health":
            self._send(200, {"status": "ok", **self.service.load()})
        else:
            raise ApiError(404, f"there is nothing at GET {path[:200]}")

    def _post(self) -> None:
        raw = self._body()
        self._check_caller()
        path = urlsplit(self.path).path
        if path not in FORMS:
            raise ApiError(404, f"there is nothing at POST {path[:200]}; known: {', '.join(FORMS)}")
        if self.headers.get_content_type() != "application/json":
            raise ApiError(415, "send the body as Content-Type: application/json")
        running = self.service.start(FORMS[path].read(_parse(raw)))
        if running.request.stream:
            self._stream(FORMS[path], running)
        else:
            for _ in self.service.pieces(running, self._connected):
                pass
            self._send(200, Writer(FORMS[path], running, self.service.policy.tokenizer).whole())

    def _stream(self, form: Form, running: Running) -> None:
        """One event a committed segment. The status is sent with the first, so that early failures have their own."""
        writer, started = Writer(form, running, self.service.policy.tokenizer), False
        try:
            for choice, piece in self.service.pieces(running, self._connected):
                if not started:
                    self._start(200, "text/event-stream; charset=utf-8")
                    self.end_headers()
                    started = True
                self._event(json.dumps(writer.chunk(choice, piece)))
            if running.request.include_usage:
                self._event(json.dumps(writer.usage_chunk()))
            self._event("[DONE]")
        except ApiError as error:
            if not started:
                raise
            self._event(json.dumps(error.body()))

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            raise ApiError(411, "a Content-Length is required")
        if int(length) > MAX_BODY:
            self.rfile.read(min(int(length), 2 * MAX_BODY))  # or the client meets a reset instead of the answer
            raise ApiError(413, f"the body has {length} bytes and the limit is {MAX_BODY}")
        return self.rfile.read(int(length))

    def _check_caller(self) -> None:
        if not self.access.knows_host(self.headers.get("Host", "")):
            raise ApiError(421, "this server does not go by that name")
        if not self.access.admits(self.headers.get("Authorization", "").removeprefix("Bearer ")):
            raise ApiError(401, "a valid token is required: Authorization: Bearer TOKEN", code="invalid_api_key")

    def _connected(self) -> bool:
        """Whether the client still holds the line."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return not readable or self.connection.recv(1, socket.MSG_PEEK) != b""

    def _start(self, status: int, kind: str) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        if status == 503:
            self.send_header("Retry-After", "1")

    def _send(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self._start(status, "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What is refused before it is read (a method, a request line), in the same form as all else."""
        self._send(code, ApiError(code, message or HTTPStatus(code).phrase).body())

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the terminal belongs to whoever started the server."""


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None
