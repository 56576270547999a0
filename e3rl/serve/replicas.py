"""Several copies of the server on Ray Serve, each with the model in a process of its own, behind one address.

Ray's proxy sends each request to a copy that has little to do, and a new copy starts where one dies. The same seed gives the
same answer, whichever copy answers.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from e3rl.errors import UserError
from e3rl.serve.server import make_app
from e3rl.serve.service import Service
from e3rl.web.access import Access

_NAME = "e3rl"


def run_replicas(
    open_service: Callable[[], Service], access: Access, *, count: int, port: int, queue: int, drain_s: float
) -> None:
    """Serve with ``count`` copies until Ctrl+C or SIGTERM. ``open_service`` runs in each copy's process.

    At most ``queue`` requests are with a copy, those that it decodes included; others wait in Ray's proxy.
    """
    try:
        import ray
        from ray import serve
    except ImportError:
        raise UserError("--replicas needs Ray Serve: pip install 'e3rl[ray]'") from None

    def build() -> ASGIApp:
        service = open_service()
        return _lasting(make_app(service, access), service.close)

    port = port or _free_port(access.host)
    ray.init(log_to_driver=False, configure_logging=False, include_dashboard=False)
    gpu = 1 if ray.cluster_resources().get("GPU", 0) >= count else 0
    copies = serve.deployment(serve.ingress(build)()).options(
        name=_NAME,
        num_replicas=count,
        max_ongoing_requests=queue,
        graceful_shutdown_timeout_s=drain_s,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpu},
    )
    try:
        serve.start(http_options={"host": access.host, "port": port}, proxy_location="HeadOnly")
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # whom serve.start has given a level
        serve.run(copies.bind(), name=_NAME)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(f"http://{access.host}:{port}/v1   ({count} copies; stop with Ctrl+C)", flush=True)
        stop.wait()
    except RuntimeError as error:
        raise UserError(f"the copies don't start: {_reason(serve, error)}") from None
    finally:
        serve.shutdown()
        ray.shutdown()


def _lasting(app: ASGIApp, close: Callable[[], None]) -> ASGIApp:
    """The app with a life span: ``close`` is called at its end."""

    async def lasting(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            return await app(scope, receive, send)
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await asyncio.to_thread(close)
        await send({"type": "lifespan.shutdown.complete"})

    return lasting


def _reason(serve: Any, error: Exception) -> str:
    """Why the copies don't start: the last line of what happened in one."""
    found = serve.status().applications.get(_NAME)
    messages = [d.message for d in found.deployments.values()] if found else []
    return ([line for m in messages for line in m.strip().splitlines() if line.strip()] or [str(error)])[-1].strip()


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as found:
        return int(found.getsockname()[1])
