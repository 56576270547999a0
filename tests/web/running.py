"""A server of ours in a thread of the test's process."""

from __future__ import annotations

import contextlib
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
