"""A server of ours in a thread of the test's process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from e3rl.web.server import WebServer


@contextlib.contextmanager
def running(server: WebServer) -> Iterator[WebServer]:
    """Answers from here on, and has ended afterwards."""
    with server:
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join(30)
            assert not thread.is_alive()


def raw(port: int, request: bytes) -> bytes:
    """What comes back for bytes sent as they are; the server may hang up before it has read them all."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection, contextlib.suppress(ConnectionError):
        with contextlib.suppress(OSError):
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        while chunk := connection.recv(65536):
            received += chunk
    return received
