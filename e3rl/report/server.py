"""Serves the page of one or several runs over HTTP, live during training. Reads run directories and answers only GET.

Rollouts may be private: without a token it listens only on this machine, and it refuses requests whose Host header names
another machine, which blocks DNS rebinding by web pages.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from e3rl.errors import UserError
from e3rl.report.embed import to_json
from e3rl.report.page import RUN_SCRIPTS, describe_run, render_page
from e3rl.train.run_directory import read_config
from e3rl.web.access import Access
from e3rl.web.door import Door
from e3rl.web.server import WebServer

POLL_MS = 2000
_MAX_TARGET = 2048
_COOKIE = "e3rl"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def serve(runs: Sequence[Path], access: Access, port: int = 8000) -> None:
    """Show ``runs`` until interrupted, to clients that ``access`` admits."""
    with make_server(runs, access, port) as server:
        server.run_until_interrupted(f"/?token={access.token}" if access.token else "/")


def make_server(runs: Sequence[Path], access: Access, port: int) -> WebServer:
    """A server that is bound but not yet running; port 0 takes any free port."""
    if not runs:
        raise UserError("no run to show: name at least one run directory")
    for run in runs:
        read_config(run)
    return WebServer(make_app(Site(tuple(runs), access)), access, port)


def make_app(site: Site) -> Door:
    """The ASGI app. It handles sockets and headers only; `Site` decides."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await asyncio.to_thread(site.answer, _target(scope), Request(scope).headers)
        await response(scope, receive, send)

    def admit(request: Request) -> Response | None:
        if request.method != "GET":
            return _answer(405, "Only GET is supported.", Allow="GET")
        return site.before(_target(request.scope), request.headers)

    return Door(app, admit=admit, refuse=_answer, largest=0)


@dataclass(frozen=True)
class Site:
    """Decides what a client may see. Knows no sockets: a request's parts in, a response out."""

    runs: tuple[Path, ...]
    access: Access

    def before(self, target: str, headers: Mapping[str, str]) -> Response | None:
        """The refusal of a GET request; None if it is allowed. ``headers`` by lower-case name."""
        if len(target) > _MAX_TARGET:
            return _answer(414, "The address is too long.")
        if not self.access.knows_host(headers.get("host", "")):
            return _answer(421, "The Host header names another server.")
        try:
            query = parse_qs(urlsplit(target).query)
        except ValueError:
            return _answer(400, "The address can't be read.")
        given = query.get("token", [""])[0]
        if given and self.access.token and self.access.admits(given):
            cookie = f"{_COOKIE}={given}; HttpOnly; SameSite=Strict; Path=/"
            return _answer(303, Location="/", Set_Cookie=cookie)
        if not self.access.admits(_token_of(headers)):
            return _answer(403, "Open the address that `e3rl view` printed: it carries the token.")
        return None

    def answer(self, target: str, headers: Mapping[str, str]) -> Response:
        """The answer to a GET request."""
        refusal = self.before(target, headers)
        if refusal is not None:
            return refusal
        url = urlsplit(target)
        try:
            return self._route(url.path.strip("/").split("/"), parse_qs(url.query))
        except UserError as error:
            return _answer(500, str(error))
        except (OSError, ValueError) as error:
            return _answer(500, f"The run can't be read: {error}")

    def _route(self, path: Sequence[str], query: Mapping[str, Sequence[str]]) -> Response:
        match path:
            case [""]:
                page = to_json({"live": True, "every": POLL_MS})
                return _answer(200, render_page("E³RL", RUN_SCRIPTS, {"run": page}, charts=True), "text/html")
            case ["api", "runs"]:
                return self._overview(query.get("since", [""])[0])
            case ["api", "runs", run, "steps", step] if _small_number(run) and _small_number(step):
                return self._rollouts(int(run), int(step))
        return _answer(404, "There is no such page.")

    def _overview(self, since: str) -> Response:
        version = fingerprint(self.runs)
        if version == since:
            return _answer(204)
        described = [describe_run(run)[0] for run in self.runs]
        return _answer(200, to_json({"version": version, "runs": described}), "application/json")

    def _rollouts(self, run: int, step: int) -> Response:
        steps = describe_run(self.runs[run])[1].steps if run < len(self.runs) else ()
        for found in steps:
            if found.step == step:
                return _answer(200, found.json, "application/json")
        return _answer(404, "There are no such rollouts.")


def fingerprint(runs: Iterable[Path]) -> str:
    """A tag that changes whenever a source file of the page changes."""
    names = ("config.toml", "metrics.jsonl", "evaluations.jsonl", "summary.json", "environment.json", "rollouts")
    parts = []
    for path in (run / name for run in runs for name in names):
        status = path.stat() if path.exists() else None
        parts.append((str(path), status and status.st_mtime_ns, status and status.st_size))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _token_of(headers: Mapping[str, str]) -> str:
    """The token in a cookie or an Authorization header."""
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(_COOKIE)
    except CookieError:
        cookie = None
    return cookie.value if cookie else headers.get("authorization", "").removeprefix("Bearer ")


def _small_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def _target(scope: Scope) -> str:
    """Path and query as sent."""
    raw, query = scope["raw_path"].decode("latin-1"), scope["query_string"].decode("latin-1")
    return f"{raw}?{query}" if query else raw


def _answer(status: int, body: str = "", kind: str = "text/plain", **headers: str) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(body, status, _HEADERS | named, f"{kind}; charset=utf-8" if body else None)
