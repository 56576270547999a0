"""The page of one or several runs over HTTP, live while they go on. Reads run directories, answers GET, nothing else.

Rollouts are what a model wrote, and perhaps nobody else's business: it listens on this machine alone unless a token is
set, and it answers no request whose Host header names another machine, so that no web page can reach it by a trick with
names.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from e3rl.errors import UserError
from e3rl.report.embed import to_json
from e3rl.report.page import RUN_SCRIPTS, describe_run, render_page
from e3rl.serve.access import Access
from e3rl.serve.sockets import Server, bind, run_until_interrupted
from e3rl.train.run_directory import read_config

POLL_MS = 2000
_MAX_TARGET = 2048
_SECONDS_TO_ASK = 10
_AT_ONCE = 64
_COOKIE = "e3rl"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def serve(runs: Sequence[Path], access: Access, port: int = 8000) -> None:
    """Show ``runs`` until interrupted, to those whom ``access`` admits."""
    with make_server(runs, access, port) as server:
        run_until_interrupted(server, f"/?token={access.token}" if access.token else "/")


def make_server(runs: Sequence[Path], access: Access, port: int) -> Server:
    """A server that is bound and not yet running; port 0 takes any free one."""
    if not runs:
        raise UserError("no run to show: name at least one run directory")
    for run in runs:
        read_config(run)
    return bind(access, port, functools.partial(_Handler, Site(tuple(runs), access)), _AT_ONCE)


@dataclass(frozen=True)
class Answer:
    """What goes back to the browser."""

    status: int
    body: str = ""
    kind: str = "text/plain"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Site:
    """What may be seen, and by whom. Knows nothing of sockets: a request's parts in, an answer out."""

    runs: tuple[Path, ...]
    access: Access

    def answer(self, target: str, headers: Mapping[str, str]) -> Answer:
        """The answer to a GET request; ``headers`` by lower-case name."""
        if len(target) > _MAX_TARGET:
            return Answer(414, "The address is too long.")
        if not self.access.knows_host(headers.get("host", "")):
            return Answer(421, "This server does not go by that name.")
        try:
            url = urlsplit(target)
        except ValueError:
            return Answer(400, "The address can't be read.")
        query = parse_qs(url.query)
        given = query.get("token", [""])[0]
        if given and self.access.token and self.access.admits(given):
            cookie = f"{_COOKIE}={given}; HttpOnly; SameSite=Strict; Path=/"
            return Answer(303, headers=(("Location", "/"), ("Set-Cookie", cookie)))
        if not self.access.admits(_token_of(headers)):
            return Answer(403, "Open the address that `e3rl view` printed: it carries the token.")
        return self._route(url.path.strip("/").split("/"), query)

    def _route(self, path: Sequence[str], query: Mapping[str, Sequence[str]]) -> Answer:
        match path:
            case [""]:
                page = to_json({"live": True, "every": POLL_MS})
                return Answer(200, render_page("E³RL", RUN_SCRIPTS, {"run": page}, charts=True), "text/html")
            case ["api", "runs"]:
                return self._overview(query.get("since", [""])[0])
            case ["api", "runs", run, "steps", step] if _small_number(run) and _small_number(step):
                return self._rollouts(int(run), int(step))
        return Answer(404, "There is no such page.")

    def _overview(self, since: str) -> Answer:
        version = fingerprint(self.runs)
        if version == since:
            return Answer(204)
        described = [describe_run(run)[0] for run in self.runs]
        return Answer(200, to_json({"version": version, "runs": described}), "application/json")

    def _rollouts(self, run: int, step: int) -> Answer:
        steps = describe_run(self.runs[run])[1].steps if run < len(self.runs) else ()
        for found in steps:
            if found.step == step:
                return Answer(200, found.json, "application/json")
        return Answer(404, "There are no such rollouts.")


def fingerprint(runs: Iterable[Path]) -> str:
    """Changes whenever a file that the page is made from does."""
    names = ("config.toml", "metrics.jsonl", "evaluations.jsonl", "summary.json", "environment.json", "rollouts")
    parts = []
    for path in (run / name for run in runs for name in names):
        status = path.stat() if path.exists() else None
        parts.append((str(path), status and status.st_mtime_ns, status and status.st_size))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _token_of(headers: Mapping[str, str]) -> str:
    """The token of a cookie, or of an Authorization header."""
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(_COOKIE)
    except CookieError:
        cookie = None
    return cookie.value if cookie else headers.get("authorization", "").removeprefix("Bearer ")


def _small_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


class _Handler(BaseHTTPRequestHandler):
    """Sockets and headers only; `Site` decides."""

    timeout = _SECONDS_TO_ASK
    server_version = "e3rl"
    sys_version = ""

    def __init__(self, site: Site, *args: Any) -> None:
        self.site = site
        super().__init__(*args)

    def do_GET(self) -> None:
        try:
            answer = self.site.answer(self.path, {name.lower(): value for name, value in self.headers.items()})
        except UserError as error:
            answer = Answer(500, str(error))
        except (OSError, ValueError) as error:
            answer = Answer(500, f"The run can't be read: {error}")
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        body = answer.body.encode()
        self.send_response(answer.status)
        for name, value in (*_HEADERS.items(), *answer.headers):
            self.send_header(name, value)
        if answer.status != 204:
            self.send_header("Content-Type", answer.kind + "; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the terminal belongs to whoever started the server."""
