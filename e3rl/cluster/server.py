"""A rollout worker over HTTP: five calls, JSON and safetensors, no pickle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from e3rl.cluster.client import WEIGHTS_CHECKSUM
from e3rl.cluster.worker import RolloutWorker
from e3rl.errors import UserError
from e3rl.web.access import Access
from e3rl.web.door import Door
from e3rl.web.prometheus import CONTENT_TYPE
from e3rl.web.server import WebServer


def make_server(worker: RolloutWorker, access: Access, port: int, largest: int) -> WebServer:
    """A server that is bound and not yet running. ``largest``: bytes of a body. It closes the worker when it stops."""
    return WebServer(make_app(worker, access, largest), access, port, on_stop=worker.close)


def make_app(worker: RolloutWorker, access: Access, largest: int) -> Door:
    """The ASGI app, behind its door."""
    loading = asyncio.Lock()

    async def hello(request: Request) -> Response:
        return Response(worker.hello())

    async def metrics(request: Request) -> Response:
        return Response(worker.metrics(), media_type=CONTENT_TYPE)

    async def exchange(request: Request) -> Response:
        return await _called(worker.exchange, await request.body())

    async def weights(request: Request) -> Response:
        body, said = await request.body(), request.headers.get(WEIGHTS_CHECKSUM, "")
        async with loading:
            return await _called(_load, worker, request.query_params.get("version", ""), said, body)

    async def offer(request: Request) -> Response:
        body = await request.body()
        async with loading:
            return await _called(worker.take_weights, body)

    async def broadcast(request: Request) -> Response:
        body = await request.body()
        async with loading:
            return await _called(_receive, worker, body)

    routes = [
        Route("/hello", hello),
        Route("/metrics", metrics),
        Route("/exchange", exchange, methods=["POST"]),
        Route("/weights", weights, methods=["POST"]),
        Route("/offer", offer, methods=["POST"]),
        Route("/broadcast", broadcast, methods=["POST"]),
    ]

    def admit(request: Request) -> Response | None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if access.knows_host(request.headers.get("host", "")) and access.admits(token if scheme == "Bearer" else ""):
            return None
        return _refusal(403, "not admitted: this server asks for a token (--token), or knows itself under another name")

    def no_such_call(request: Request, error: Exception) -> Response:
        return _refusal(error.status_code if isinstance(error, HTTPException) else 404, "no such call")

    app = Starlette(routes=routes, exception_handlers={HTTPException: no_such_call})
    return Door(app, admit=admit, refuse=_refusal, largest=largest, budget=2 * largest)


def _load(worker: RolloutWorker, version: str, said: str, body: bytes) -> bytes:
    if not (version.isascii() and version.isdigit() and len(version) < 20):
        raise ValueError("version: a whole number is required")
    worker.load_weights(int(version), body, said)
    return b""


def _receive(worker: RolloutWorker, body: bytes) -> bytes:
    worker.receive_weights(body)
    return b""


async def _called(call: Callable[..., bytes], *arguments: Any) -> Response:
    """What a call of the worker gives, in a thread; what it can't use is status 400, its own failure 500."""
    try:
        return Response(await asyncio.to_thread(call, *arguments))
    except (ValueError, UserError) as error:
        return _refusal(400, str(error))
    except Exception as error:  # the server keeps running; the client gets the error
        return _refusal(500, f"{type(error).__name__}: {error}")


def _refusal(status: int, message: str) -> Response:
    return PlainTextResponse(message.encode(errors="replace"), status)
