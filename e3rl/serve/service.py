"""Between the wire and the worker: one request in, its samples' segments out as they are committed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

from e3rl.config import Config, DataConfig
from e3rl.data.prompts import render_prompts
from e3rl.engine.build import build_engine
from e3rl.errors import UserError
from e3rl.models import Policy
from e3rl.rollout.group import Committed, Erased, Event, GroupSettings
from e3rl.rollout.statistics import ReferenceStatistics
from e3rl.serve.choices import Choice, Piece, usage
from e3rl.serve.errors import ApiError, as_api_error
from e3rl.serve.requests import DecodingRequest
from e3rl.serve.settings import Decoding, decoding
from e3rl.serve.text import TextStream
from e3rl.serve.worker import DecodingWorker, Failed, Outbox, Ticket
from e3rl.types import Problem, Prompt

_SECONDS_BETWEEN_LOOKS = 0.1


class Gone(Exception):
    """The client has hung up."""


@dataclass(frozen=True)
class Running:
    """A request under way."""

    request: DecodingRequest
    settings: Decoding
    prompts: tuple[Prompt, ...]
    choices: tuple[Choice, ...]
    outbox: Outbox
    cancelled: threading.Event

    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        return usage(sum(len(p.ids) for p in self.prompts), self.choices)


class Service:
    """One model, decoded for many clients at once."""

    def __init__(
        self,
        policy: Policy,
        config: Config,
        reference: ReferenceStatistics | None,
        *,
        name: str,
        max_length: int,
        queue_limit: int,
    ) -> None:
        self.name, self.policy = name, policy
        self._config, self._reference = config, reference
        self._max_length = min(max_length, policy.context_length)
        rows = config.rollout.cache_rows or config.rollout.max_rows
        # a row holds prompt and response together; how the two divide it is each request's own affair
        rollout = replace(config.rollout, cache_rows=rows, max_completion_length=1)
        self._engine = build_engine(rollout, policy.model, policy.eos_ids, self._max_length - 1)
        self._worker = DecodingWorker(self._engine, rows=rows, queue_limit=queue_limit)

    def close(self) -> None:
        """Stop decoding; requests under way are refused."""
        self._worker.stop()

    def load(self) -> dict[str, int]:
        """How much is decoding and waiting, and how many more rows could be taken."""
        return {**self._worker.load(), "free_rows": self._engine.free_rows()}

    def start(self, request: DecodingRequest) -> Running:
        """Check a request and queue its groups; ApiError where it can't be served."""
        if request.model != self.name:
            raise ApiError(
                404, f"no model '{request.model}' here, only '{self.name}'", param="model", code="model_not_found"
            )
        if request.n > self._worker.rows:
            raise ApiError(400, f"n = {request.n}, and the server holds {self._worker.rows} rows", param="n")
        try:
            prompts = tuple(self._prompt(i, p) for i, p in enumerate(request.prompts))
            room = self._max_length - max(len(p.ids) for p in prompts)
            settings = decoding(request, self._config, self._reference, room=room)
            running = self._running(request, settings, prompts)
            self._worker.submit([self._ticket(running, i) for i in range(len(prompts))])
        except UserError as error:
            raise as_api_error(error) from None
        return running

    def pieces(self, running: Running, connected: Callable[[], bool]) -> Iterator[tuple[Choice, Piece]]:
        """Every committed segment with the sample it belongs to. Ending early for any reason frees the rows."""
        looked = time.monotonic()
        try:
            while any(c.finish is None for c in running.choices):
                found = self._next(running)
                if time.monotonic() - looked >= _SECONDS_BETWEEN_LOOKS:
                    looked = time.monotonic()
                    if not connected():
                        raise Gone
                if found is not None:
                    yield from self._apply(running, *found)
        finally:
            running.cancelled.set()
            self._worker.wake()

    def _next(self, running: Running) -> tuple[int, Event] | None:
        """The next event and the prompt it is about; None where there is none for a while."""
        try:
            message = running.outbox.get(timeout=_SECONDS_BETWEEN_LOOKS)
        except Empty:
            return None
        if isinstance(message, Failed):
            raise message.error
        return message

    def _apply(self, running: Running, prompt: int, event: Event) -> Iterator[tuple[Choice, Piece]]:
        if isinstance(event, Committed | Erased):
            choice = running.choices[prompt * running.request.n + event.sibling]
            if isinstance(event, Erased):
                choice.erased(event)
            elif piece := choice.committed(event):
                yield choice, piece

    def _running(self, request: DecodingRequest, settings: Decoding, prompts: tuple[Prompt, ...]) -> Running:
        limit, tokenizer = settings.rollout.completion_limit, self.policy.tokenizer
        indices = range(len(prompts) * request.n)
        choices = tuple(Choice(i, limit, TextStream(tokenizer, request.stop)) for i in indices)
        return Running(request, settings, prompts, choices, SimpleQueue(), threading.Event())

    def _ticket(self, running: Running, index: int) -> Ticket:
        chosen = running.settings
        settings = GroupSettings(chosen.rollout, chosen.erasure, chosen.seed, reference=self._reference)
        settings.check()
        return Ticket(running.prompts[index], settings, index, running.outbox, running.cancelled)

    def _prompt(self, index: int, prompt: str | tuple[object, ...]) -> Prompt:
        """A conversation goes through the chat template; a text is encoded, and token ids are taken, as they stand."""
        name = f"prompt-{index}"
        if isinstance(prompt, str):
            return Prompt(Problem(name, prompt), tuple(self.policy.tokenizer.encode(prompt)))
        if all(isinstance(i, int) for i in prompt):
            return Prompt(Problem(name, ""), prompt)  # type: ignore[arg-type]
        (rendered,) = render_prompts(
            [Problem(name, prompt)],  # type: ignore[arg-type]
            self.policy.tokenizer,
            DataConfig(),
            context_limit=self._max_length,
            completion_limit=1,
        )
        return rendered
