"""A rollout worker over HTTP: three calls, JSON and safetensors, no pickle."""

from __future__ import annotations

import hashlib
import hmac
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from e3rl.cluster.worker import RolloutWorker
from e3rl.errors import UserError

WEIGHTS_DIGEST = "X-E3RL-Digest"
_SECONDS_TO_ASK = 300  # for a whole request to arrive; weights are large
_CHUNK = 2**22


def make_server(
    worker: RolloutWorker, host: str, port: int, admits: Callable[[str, str], bool], largest: int
) -> ThreadingHTTPServer:
    """A server that is bound and not yet running. ``admits`` decides by Host header and token; ``largest``: body bytes."""

    class Handler(_Handler):
        pass

    Handler.worker, Handler.admits, Handler.largest = worker, staticmethod(admits), largest
    try:
        return _Server((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"can't listen on {host}:{port}: {error}. Choose another --port; 0 takes any free one"
        ) from None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)


class _Handler(BaseHTTPRequestHandler):
    worker: RolloutWorker
    admits: Callable[[str, str], bool]
    largest: int
    timeout = _SECONDS_TO_ASK
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or whatever follows the headers waits 40 ms for their acknowledgement
    _loading = threading.Lock()

    def do_GET(self) -> None:
        if self._allowed():
            self._answer(200, self.worker.hello()) if self.path == "/hello" else self._answer(404, b"no such page")

    def do_POST(self) -> None:
        if not self._allowed():
            return
        body = self._body()
        path = urlsplit(self.path).path
        if body is None:
            return
        try:
            if path == "/exchange":
                self._answer(200, self.worker.exchange(body))
            elif path == "/weights":
                self._load(body)
            else:
                self._answer(404, b"no such call")
        except (ValueError, UserError) as error:
            self._answer(400, str(error).encode())
        except Exception as error:  # the server lives on; the trainer is told
            self._answer(500, f"{type(error).__name__}: {error}".encode())

    def _load(self, body: bytes) -> None:
        version = int(parse_qs(urlsplit(self.path).query)["version"][0])
        if not hmac.compare_digest(digest(body), self.headers.get(WEIGHTS_DIGEST, "")):
            raise ValueError("the weights arrived damaged: their checksum differs")
        with self._loading:
            self.worker.load_weights(version, body)
        self._answer(200, b"")

    def _allowed(self) -> bool:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if self.admits(self.headers.get("Host", ""), token if scheme == "Bearer" else ""):
            return True
        self.close_connection = True
        self._answer(403, b"not admitted: this server asks for a token (--token), or knows itself under another name")
        return False

    def _body(self) -> bytes | None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > self.largest:
            self.close_connection = True
            self._answer(413, f"a body of at most {self.largest} bytes is taken, with its length said".encode())
            return None
        parts, left = [], int(length)
        while left:
            part = self.rfile.read(min(left, _CHUNK))
            if not part:
                self.close_connection = True
                return None
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *values: Any) -> None:
        """Quiet: a trainer asks once a second."""


def digest(weights: bytes) -> str:
    """The checksum that travels with weights."""
    return hashlib.blake2b(weights, digest_size=16).hexdigest()
