"""The live page of a server: what is committed and what is erased, as it happens. Served only with `--page`."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import deque
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse

from e3rl.rollout.orders import Committed, Erased, Event
from e3rl.serve.errors import ApiError

_VIEWERS, _BEHIND, _RECENT = 16, 512, 200
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"


class LiveFeed:
    """What viewers are sent. Used by the event loop alone. A viewer that falls behind misses events."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._viewers: set[asyncio.Queue[str | None]] = set()
        self._recent: deque[str] = deque(maxlen=_RECENT)
        self._numbers = itertools.count(1)

    def number(self) -> int:
        """The name of a new request."""
        return next(self._numbers)

    def tell(self, request: int, choice: int, event: Event) -> None:
        """Show a candidate that was committed or erased."""
        if not isinstance(event, Committed | Erased):
            return
        part = event.erasure if isinstance(event, Erased) else event.segment
        judgement = part.judgement
        facts: dict[str, Any] = {"request": request, "choice": choice, "segment": part.index}
        if judgement is not None:
            measured = {"u": judgement.uncertainty.total, "threshold": judgement.threshold.total}
            facts |= {name: round(value, 4) for name, value in measured.items() if abs(value) < 1e9}
        text = self._tokenizer.decode(part.candidate.ids.tolist(), skip_special_tokens=True)
        self._send(json.dumps({**facts, "text": text, "erased": isinstance(event, Erased)}))

    def show(self, request: int, choice: int, segment: int, text: str) -> None:
        """Show a part of a plain segment."""
        facts = {"request": request, "choice": choice, "segment": segment, "text": text, "erased": False}
        self._send(json.dumps(facts))

    def close(self) -> None:
        """End all viewers' streams."""
        for queue in self._viewers:
            queue.put_nowait(None)

    def _send(self, message: str) -> None:
        self._recent.append(message)
        for queue in self._viewers:
            if queue.qsize() < _BEHIND:
                queue.put_nowait(message)

    async def page(self, request: Request) -> Response:
        """GET /."""
        html = files("e3rl.serve").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(html, headers={"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"})

    async def events(self, request: Request) -> Response:
        """GET /live: server-sent events, the latest first of all."""
        if len(self._viewers) >= _VIEWERS:
            raise ApiError(429, f"{_VIEWERS} viewers watch already")
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        return StreamingResponse(self._stream(), media_type="text/event-stream", headers=headers)

    async def _stream(self) -> AsyncIterator[str]:
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        self._viewers.add(queue)
        try:
            yield ": watching\n\n"
            for earlier in list(self._recent):
                yield f"data: {earlier}\n\n"
            while (message := await queue.get()) is not None:
                yield f"data: {message}\n\n"
        finally:
            self._viewers.discard(queue)
