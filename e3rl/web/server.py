"""Runs an ASGI app: a bound socket, uvicorn, and limits for slow or many connections."""

from __future__ import annotations

import asyncio
import resource
import socket
import sys
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import cast

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from e3rl.errors import UserError
from e3rl.web.access import Access, network
from e3rl.web.door import ADMITTED, ENDED, SHARE

SECONDS_TO_ASK = 10.0
"""For the headers of a request to arrive."""
SECONDS_TO_READ = 60.0
"""Longest time that a client may leave an answer unread."""
SECONDS_IDLE = 75
"""A connection that nothing is asked on is closed after this time."""
SECONDS_TO_END = 5
"""Time that requests have when the server stops."""
CONNECTIONS = 2048
_BACKLOG = 2048
_EARLY_BYTES = 2**16
_FILES_KEPT = 256  # descriptors that connections leave to everything else
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class WebServer:
    """Listens from its construction on and answers from `run` on; port 0 takes any free one.

    ``on_stop`` is called when it is to stop: it ends what requests in progress wait for. Before, for at most ``drain_s``
    seconds and until a second Ctrl+C, ``drain`` is asked whether there are requests to wait for.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        port: int,
        on_stop: Callable[[], None] | None = None,
        *,
        drain: Callable[[], bool] | None = None,
        drain_s: float = 0.0,
    ) -> None:
        family = socket.AF_INET6 if ":" in access.host else socket.AF_INET
        try:
            self._socket = socket.create_server((access.host, port), family=family, backlog=_BACKLOG)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"can't listen on {access.host} port {port}: {error}. Choose another with --port; 0 takes any free one"
            ) from None
        # connections inherit it; without, an answer waits 40 ms for the acknowledgement of its headers
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._host, self.port = access.host, int(self._socket.getsockname()[1])
        config = uvicorn.Config(
            app,
            http=HttpConnection,
            ws="none",
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_config=None,  # logging is left to the caller
            log_level="critical",
            backlog=_BACKLOG,
            timeout_keep_alive=SECONDS_IDLE,
            timeout_graceful_shutdown=SECONDS_TO_END,
        )
        self._uvicorn = _Uvicorn(config, on_stop, drain, drain_s)

    @property
    def url(self) -> str:
        """The address, without a path."""
        return f"http://{f'[{self._host}]' if ':' in self._host else self._host}:{self.port}"

    def run(self) -> None:
        """Answer until `stop`, or until SIGINT or SIGTERM where this is the main thread."""
        self._uvicorn.run([self._socket])

    def run_until_interrupted(self, suffix: str = "") -> None:
        """Say where the server is reached, with ``suffix`` behind its address, and answer until Ctrl+C."""
        print(f"{self.url}{suffix}   (stop with Ctrl+C)", flush=True)
        try:
            self.run()
        except KeyboardInterrupt:
            print()

    def stop(self) -> None:
        """End `run`, which may be in another thread."""
        self._uvicorn.should_exit = True

    def __enter__(self) -> WebServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()


class _Uvicorn(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        on_stop: Callable[[], None] | None,
        drain: Callable[[], bool] | None,
        drain_s: float,
    ) -> None:
        super().__init__(config)
        self._on_stop, self._drain, self._drain_s = on_stop, drain, drain_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._drain is not None:
            clock = asyncio.get_running_loop().time
            until, told = clock() + self._drain_s, False
            while self._drain() and not self.force_exit and clock() < until:
                if not told:
                    print("requests in progress may end; Ctrl+C again stops at once", file=sys.stderr, flush=True)
                    told = True
                await asyncio.sleep(0.05)
        if self._on_stop is not None:
            await asyncio.to_thread(self._on_stop)
        await super().shutdown(sockets)


class HttpConnection(H11Protocol):
    """Uvicorn's connection, with deadlines for clients that don't send or don't read.

    There is room for a new one: beyond the limit, and beyond the `SHARE` of it that an address has, the connection that has
    been without an admitted request for longest is closed for it. A client that disconnects is noticed even after a request
    sent early.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since, self._known = self.loop.time(), False  # idle since; had an admitted request before
        self._early = b""  # sent before the answer to the last request was complete
        self._asking: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None
        self._expect_request()
        self._address, most = network(self.client[0] if self.client else ""), _most_connections()
        near = [c for c in self.connections if isinstance(c, HttpConnection) and c._address == self._address]
        if len(near) > SHARE * most:
            self._make_room(near)
        elif len(self.connections) > most:
            self._make_room(c for c in self.connections if isinstance(c, HttpConnection))

    def data_received(self, data: bytes) -> None:
        if self._busy and not self.cycle.more_body:  # given to uvicorn now, it would stop reading and miss the end
            self._early += data
            if len(self._early) > _EARLY_BYTES:
                self.transport.abort()
            return
        try:
            super().data_received(data)
        except h11.LocalProtocolError:  # invalid data in a body that was answered already
            self.transport.abort()
        if self._busy:
            self._cancel_asking()
        else:
            self._expect_request()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client sends no more. A request that is complete is answered; the app's ``receive`` says that it has ended."""
        if not self._busy or self.cycle.more_body:
            return None  # closes
        cast("dict[str, object]", self.cycle.scope)[ENDED] = True
        self.cycle.message_event.set()
        return True

    def on_response_complete(self) -> None:
        self._since, self._known = self.loop.time(), self._known or self._admitted
        if self.cycle.scope.get(ENDED):
            self.transport.close()
        super().on_response_complete()
        if self._early and not self.transport.is_closing():
            early, self._early = self._early, b""
            self.data_received(early)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel_asking()
        self._cancel_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cancel_reading()
        self._reading = self.loop.call_later(SECONDS_TO_READ, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_reading()

    @property
    def _busy(self) -> bool:
        """A request has come and is not answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _admitted(self) -> bool:
        return self.cycle is not None and bool(self.cycle.scope.get(ADMITTED))

    def _make_room(self, among: Iterable[HttpConnection]) -> None:
        others = [c for c in among if c is not self and not (c._busy and c._admitted)]
        if not others:
            self.transport.write(_FULL)
            self.transport.close()
            return
        oldest = min(others, key=lambda c: (c._known, c._since))
        self.connections.discard(oldest)
        oldest.transport.abort()

    def _expect_request(self) -> None:
        if self._asking is None:
            self._asking = self.loop.call_later(SECONDS_TO_ASK, self.transport.abort)

    def _cancel_asking(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None

    def _cancel_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None


def _most_connections() -> int:
    """As many as the limit of open files leaves room for."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if files == resource.RLIM_INFINITY else min(CONNECTIONS, max(16, files - _FILES_KEPT))
