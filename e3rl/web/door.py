"""ASGI middleware: admits a request by its headers, reads its body within limits, then calls the app."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from e3rl.web.access import network

ADMITTED, ENDED = "e3rl.admitted", "e3rl.ended"
"""Keys of a scope: the door has admitted the request, whose body is there; the client will send nothing more."""

SHARE = 3 / 4
"""Of what there is of connections, and of room for bodies: the most that one address may have."""
SMALL = 2**16
"""Bodies of so many bytes always have room: connections have a limit."""

SECONDS_TO_SEND = 20.0
"""For a body to arrive, beside what `SLOWEST` allows for its length."""
SLOWEST = 2**20
"""Bytes a second at which a long body must arrive."""
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 2**23


class Door:
    """Calls ``app`` with requests that ``admit`` lets in and whose body has at most ``largest`` bytes.

    ``admit`` sees the headers alone and returns None, or the answer to send instead. ``refuse`` words a refusal, given
    its status and a sentence. All bodies that are held at one time have at most ``budget`` bytes, but for `SMALL` ones, and
    those of an address its `SHARE` of that.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        admit: Callable[[Request], Response | None],
        refuse: Callable[[int, str], Response],
        largest: int,
        budget: int = 2**28,
    ) -> None:
        self._app, self._admit, self._refuse = app, admit, refuse
        self._largest, self._budget = largest, max(budget, largest)
        self._held: Counter[str] = Counter()  # bytes by address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        refusal = self._admit(request)
        length = _length(request)
        if refusal is None and length is None:
            refusal = self._refuse(411, "a Content-Length is required")
        elif refusal is None and length is not None and length > self._largest:
            refusal = self._refuse(413, f"the body has {length} bytes and the limit is {self._largest}")
        if refusal is not None:
            await _answer_unread(refusal, scope, receive, send, unread=length != 0)
            return
        parts, who = list[bytes](), network(request.client.host if request.client else "")
        try:
            refusal = await self._read(length or 0, receive, parts, who)
            if refusal is not None:
                self._drop(parts, who)
                await _answer_unread(refusal, scope, receive, send, unread=True)
            else:
                scope[ADMITTED] = True
                await self._app(scope, _replay(b"".join(parts), scope, receive), send)
        except _Gone:
            return
        finally:
            self._drop(parts, who)

    def _drop(self, parts: list[bytes], who: str) -> None:
        self._held[who] -= sum(map(len, parts))
        parts.clear()
        if not self._held[who]:
            del self._held[who]

    def _room(self, who: str) -> bool:
        return self._held.total() <= self._budget and self._held[who] <= max(self._largest, SHARE * self._budget)

    async def _read(self, length: int, receive: Receive, parts: list[bytes], who: str) -> Response | None:
        """Fill ``parts`` with the body; the refusal where it doesn't arrive in time or there is no room for it."""
        try:
            async with asyncio.timeout(SECONDS_TO_SEND + length / SLOWEST):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    part = message.get("body", b"")
                    parts.append(part)
                    self._held[who] += len(part)
                    if length > SMALL and not self._room(who):
                        return self._refuse(503, "too many large requests at a time; try again soon")
                    if not message.get("more_body", False):
                        return None
        except TimeoutError:
            return self._refuse(408, "the body did not arrive in time")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do ``work``, which is cancelled when the client hangs up."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(receive())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
    finally:
        done = working.done()
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
    if done:
        working.result()


class _Gone(Exception):
    """The client has hung up."""


def _length(request: Request) -> int | None:
    """The body's length as announced; None where a body is announced without one that can be read."""
    if "transfer-encoding" in request.headers:
        return None
    said = request.headers.get("content-length", "" if request.method == "POST" else "0")
    return int(said) if said.isascii() and said.isdigit() and len(said) < 20 else None


def _replay(body: bytes, scope: Scope, receive: Receive) -> Receive:
    """``receive`` for an app whose request was read before: the body, then whether the client is still there."""
    whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        if whole:
            return whole.pop()
        if not scope.get(ENDED):
            await receive()  # returns only when the client has hung up
        return {"type": "http.disconnect"}

    return replay


async def _answer_unread(response: Response, scope: Scope, receive: Receive, send: Send, *, unread: bool) -> None:
    """Answer without reading the body, and close the connection.

    For a moment, what still arrives is read and dropped: a socket that is closed with unread bytes resets the connection, and
    the client would not see the answer.
    """
    response.headers["connection"] = "close"

    async def hold(message: Message) -> None:
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        await send({**message, "more_body": True} if last else message)

    if not unread:
        await response(scope, receive, send)
        return
    await response(scope, receive, hold)
    left = _LINGER_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    break
                left -= len(message.get("body", b""))
    await send({"type": "http.response.body", "body": b"", "more_body": False})
