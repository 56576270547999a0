"""What servers of ours have in common below HTTP: an address, a thread a connection, and a limit to both."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from e3rl.errors import UserError
from e3rl.serve.access import Access

Handler = Callable[..., BaseHTTPRequestHandler]


class Server(ThreadingHTTPServer):
    """A thread a connection, as many as ``at_once``; one too many is turned away."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: Handler, at_once: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._free = threading.BoundedSemaphore(at_once)
        super().__init__(address, handler)  # type: ignore[arg-type]

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no event."""


def bind(access: Access, port: int, handler: Handler, at_once: int) -> Server:
    """A server that is bound and not yet running; port 0 takes any free one."""
    try:
        return Server((access.host, port), handler, at_once)
    except (OSError, OverflowError) as error:
        raise UserError(f"can't listen on {access.host} port {port}: {error}. Choose another with --port.") from None


def run_until_interrupted(server: Server, suffix: str) -> None:
    """Say where the server is reached, with ``suffix`` behind its address, and answer until Ctrl+C."""
    host, port = str(server.server_address[0]), server.server_address[1]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}{suffix}   (stop with Ctrl+C)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
