"""HTTP around the service: routes, JSON and server-sent events.

It listens on this machine alone unless a token is set, answers only under its own name, and takes only JSON, so that
no web page can make a browser ask it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from e3rl.errors import UserError
from e3rl.serve.errors import ApiError
from e3rl.serve.forms import FORMS, AnswerWriter, Form
from e3rl.serve.grammar import Grammar
from e3rl.serve.requests import DecodingRequest, read_detokenize, read_tokenize
from e3rl.serve.service import Running, Service
from e3rl.serve.worker import Outbox
from e3rl.web.access import Access, network
from e3rl.web.door import Door, while_connected
from e3rl.web.prometheus import CONTENT_TYPE
from e3rl.web.server import WebServer

T = TypeVar("T")
MAX_BODY = 4 * 2**20
READERS = 8
"""Threads that read requests: conversations are written out, texts become tokens, grammars are compiled."""
_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def make_server(service: Service, access: Access, port: int, *, drain_s: float = 0.0) -> WebServer:
    """A server that is bound and not yet running; port 0 takes any free one. When it is to stop, requests in progress have
    ``drain_s`` seconds to end; then it closes the service."""
    app = make_app(service, access)
    if service.live is not None and access.token:
        raise UserError(
            "--page is for a server without --token: a browser sends none, and the page shows what all clients get"
        )
    return WebServer(app, access, port, on_stop=service.close, drain=service.drain, drain_s=drain_s)


def make_app(service: Service, access: Access) -> Door:
    """The ASGI app, behind its door."""
    api = _Api(service, _SharedThreads(READERS, READERS // 2), _SharedThreads(1, 1))
    routes = [
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/health", api.health),
        Route("/metrics", api.metrics),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        *(Route(path, api.post, methods=["POST"]) for path in FORMS),
    ]
    if service.live is not None:
        routes += [Route("/", service.live.page), Route("/live", service.live.events)]
    app = Starlette(
        routes=routes, exception_handlers={ApiError: _refused, HTTPException: _unrouted, Exception: _broken}
    )
    app.router.redirect_slashes = False

    def admit(request: Request) -> Response | None:
        if not access.knows_host(request.headers.get("host", "")):
            return _error(ApiError(421, "this server does not go by that name"))
        if not access.admits(request.headers.get("authorization", "").removeprefix("Bearer ")):
            message = "a valid token is required: Authorization: Bearer TOKEN"
            return _error(ApiError(401, message, code="invalid_api_key"))
        return None

    paths = {route.path for route in routes}

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        """The app, with each answer counted by its path and status."""
        status = "499"

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await app(scope, receive, watch)
        finally:
            path = scope["path"] if scope["path"] in paths else "other"
            service.metrics.add("e3rl_requests_total", path=path, status=status)

    return Door(
        counted, admit=admit, refuse=lambda status, message: _error(ApiError(status, message)), largest=MAX_BODY
    )


class _SharedThreads:
    """Threads for what a client sent, which may take long to read. An address has at most ``share`` of them at a time."""

    def __init__(self, threads: int, share: int) -> None:
        self._pool, self._share = ThreadPoolExecutor(threads, "e3rl-requests"), share
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def run(self, who: str, work: Callable[[], T]) -> T:
        """Do ``work``; others do theirs meanwhile."""
        turn = self._turns.setdefault(who, asyncio.Semaphore(self._share))
        async with turn:
            try:
                return await asyncio.get_running_loop().run_in_executor(self._pool, work)
            except RecursionError:
                raise ApiError(400, "the body is nested too deeply") from None


@dataclass(frozen=True)
class _Api:
    """The handlers by path. Grammars that are tried for the first time have a thread of their own."""

    service: Service
    readers: _SharedThreads
    trials: _SharedThreads

    def _card(self) -> dict[str, Any]:
        limit = self.service.max_length
        return {"id": self.service.name, "object": "model", "created": 0, "owned_by": "e3rl", "max_model_len": limit}

    async def models(self, request: Request) -> Response:
        return _json(200, {"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self.service.name:
            raise HTTPException(404)
        return _json(200, self._card())

    async def health(self, request: Request) -> Response:
        return _json(200, {"status": "ok", **self.service.load()})

    async def metrics(self, request: Request) -> Response:
        return Response(self.service.metrics_text(), media_type=CONTENT_TYPE, headers=_HEADERS)

    async def tokenize(self, request: Request) -> Response:
        body = await _body(request)
        found = await self._read(request, lambda: self._tokens(read_tokenize(_parse(body)), _parse(body)))
        return _json(200, found)

    async def _read(self, request: Request, work: Callable[[], T]) -> T:
        return await self.readers.run(_client(request)[0], work)

    def _tokens(self, asked: DecodingRequest, body: Any) -> dict[str, Any]:
        (prompt,) = asked.prompts
        ids = [int(i) for i in self.service.encode(prompt, asked.add_special_tokens)]
        found = {"count": len(ids), "max_model_len": self.service.max_length, "tokens": ids}
        if body.get("return_token_strs"):
            found["token_strs"] = self.service.policy.tokenizer.convert_ids_to_tokens(ids)
        return found

    async def detokenize(self, request: Request) -> Response:
        body, tokenizer = await _body(request), self.service.policy.tokenizer
        return _json(
            200, {"prompt": await self._read(request, lambda: tokenizer.decode(read_detokenize(_parse(body))))}
        )

    def _asked(self, form: Form, body: bytes) -> tuple[DecodingRequest, Grammar | None]:
        asked = form.read(_parse(body))
        return asked, self.service.grammar(asked)

    async def post(self, request: Request) -> _Reply:
        form, body, outbox = FORMS[request.url.path], await _body(request), Outbox()
        asked, grammar = await self._read(request, lambda: self._asked(form, body))
        client = _client(request)
        if grammar is not None and not self.service.grammars.knows(grammar):
            await self.trials.run(client[0], lambda: self.service.grammars.try_out(grammar))
        running = await self._read(request, lambda: self.service.start(asked, outbox, client))
        writer = AnswerWriter(form, running, self.service.policy.tokenizer, self.service.name)
        return _Reply(self.service, running, writer)


@dataclass(frozen=True)
class _Reply:
    """The response to a decoding request, as Starlette calls it. A client that hangs up takes its rows' work with it."""

    service: Service
    running: Running
    writer: AnswerWriter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self.running.request.stream:
                await while_connected(receive, self._stream(send))
            else:
                await while_connected(receive, self._whole(scope, receive, send))
        finally:
            self.service.drop(self.running)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        async for _ in self.service.pieces(self.running):
            pass
        await _json(200, self.writer.whole())(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        """One event a committed segment, or a few tokens of a plain one. The status is sent with the first, so that early
        failures have their own."""
        started = False

        async def event(data: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        try:
            async with contextlib.aclosing(self.service.pieces(self.running)) as pieces:
                async for choice, piece in pieces:
                    if not started:
                        headers = {**_HEADERS, "Content-Type": "text/event-stream; charset=utf-8"}
                        raw = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
                        await send({"type": "http.response.start", "status": 200, "headers": raw})
                        started = True
                    await event(self.writer.chunk(choice, piece))
            if self.running.request.include_usage:
                await event(self.writer.usage_chunk())
            await event("[DONE]")
        except ApiError as error:
            if not started:
                raise
            await event(json.dumps(error.body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _body(request: Request) -> bytes:
    """The body of a request that says that it is JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the body as Content-Type: application/json")
    return await request.body()


def _client(request: Request) -> tuple[str, str]:
    """Who asks: an address (`network`), and the key that the client sent, whatever it is."""
    return network(request.client.host) if request.client else "", request.headers.get("authorization", "")


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None


def _json(status: int, value: dict[str, Any]) -> Response:
    return JSONResponse(value, status, _HEADERS)


def _error(error: ApiError) -> Response:
    response = _json(error.status, error.body())
    if error.status in (429, 503):
        response.headers["Retry-After"] = "1"
    return response


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error)


def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = f"; known: {', '.join((*FORMS, '/tokenize', '/detokenize'))}" if request.method == "POST" else ""
    response = _error(
        ApiError(error.status_code, f"there is nothing at {request.method} {request.url.path[:200]}{known}")
    )
    response.headers.update(error.headers or {})
    return response


def _broken(request: Request, error: Exception) -> Response:
    """Unexpected errors: the client gets an error object, never a traceback."""
    traceback.print_exception(error, file=sys.stderr)
    return _error(ApiError(500, "an internal error; the server's own output says more"))
