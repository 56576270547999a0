"""Between the wire and the worker: one request in, its samples' segments out as they are committed."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, replace

from e3rl.config import Config, DataConfig
from e3rl.data.prompts import render_prompts
from e3rl.engine.build import build_engine
from e3rl.errors import UserError
from e3rl.models import Policy
from e3rl.rollout.group import Committed, Erased, Event, GroupSettings
from e3rl.rollout.statistics import CalibrationStatistics
from e3rl.serve.choices import Piece, ServedChoice, usage
from e3rl.serve.errors import ApiError, as_api_error
from e3rl.serve.requests import DecodingRequest
from e3rl.serve.settings import RequestSettings, decoding
from e3rl.serve.text import TextStream
from e3rl.serve.worker import DecodingWorker, Failed, Outbox, Ticket
from e3rl.types import Problem, Prompt


@dataclass(frozen=True)
class Running:
    """A request under way."""

    request: DecodingRequest
    settings: RequestSettings
    prompts: tuple[Prompt, ...]
    choices: tuple[ServedChoice, ...]
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
        calibration: CalibrationStatistics | None,
        *,
        name: str,
        max_length: int,
        queue_limit: int,
    ) -> None:
        self.name, self.policy = name, policy
        self._config, self._calibration = config, calibration
        self.max_length = min(max_length, policy.context_length)
        rows = config.rollout.cache_rows or config.rollout.max_rows
        # a row holds prompt and response together; how the two divide it is each request's own affair
        rollout = replace(config.rollout, cache_rows=rows, max_completion_length=1)
        self._engine = build_engine(rollout, policy.model, policy.eos_ids, self.max_length - 1)
        self._worker = DecodingWorker(self._engine, rows=rows, queue_limit=queue_limit)

    def close(self) -> None:
        """Stop decoding; requests under way are refused."""
        self._worker.stop()

    def drain(self) -> bool:
        """Take no more requests; whether earlier ones are still under way."""
        return self._worker.drain()

    def load(self) -> dict[str, int]:
        """How much is decoding and waiting, and how many more rows could be taken."""
        return {**self._worker.load(), "free_rows": self._engine.free_rows()}

    def start(self, request: DecodingRequest, outbox: Outbox) -> Running:
        """Check a request and queue its groups, whose events go to ``outbox``; ApiError where it can't be served."""
        if request.model != self.name:
            raise ApiError(
                404, f"no model '{request.model}' here, only '{self.name}'", param="model", code="model_not_found"
            )
        if request.n > self._worker.rows:
            raise ApiError(400, f"n = {request.n}, and the server holds {self._worker.rows} rows", param="n")
        try:
            prompts = tuple(self._prompt(i, p) for i, p in enumerate(request.prompts))
            room = self.max_length - max(len(p.ids) for p in prompts)
            settings = decoding(request, self._config, self._calibration, room=room)
            running = self._running(request, settings, prompts, outbox)
            self._worker.submit([self._ticket(running, i) for i in range(len(prompts))])
        except UserError as error:
            raise as_api_error(error) from None
        return running

    async def pieces(self, running: Running) -> AsyncGenerator[tuple[ServedChoice, Piece], None]:
        """Every committed segment with the sample it belongs to, until all samples have ended; ApiError where they can't."""
        while any(c.finish is None for c in running.choices):
            message = await running.outbox.get()
            if isinstance(message, Failed):
                raise message.error
            for found in self._apply(running, *message):
                yield found

    def drop(self, running: Running) -> None:
        """Nobody waits for the request any more: its rows become free."""
        running.cancelled.set()
        self._worker.wake()

    def _apply(self, running: Running, prompt: int, event: Event) -> Iterator[tuple[ServedChoice, Piece]]:
        if isinstance(event, Committed | Erased):
            choice = running.choices[prompt * running.request.n + event.sibling]
            if isinstance(event, Erased):
                choice.erased(event)
            elif piece := choice.committed(event):
                yield choice, piece

    def _running(
        self, request: DecodingRequest, settings: RequestSettings, prompts: tuple[Prompt, ...], outbox: Outbox
    ) -> Running:
        limit, tokenizer = settings.rollout.completion_limit, self.policy.tokenizer
        indices = range(len(prompts) * request.n)
        choices = tuple(ServedChoice(i, limit, TextStream(tokenizer, request.stop)) for i in indices)
        return Running(request, settings, prompts, choices, outbox, threading.Event())

    def _ticket(self, running: Running, index: int) -> Ticket:
        chosen = running.settings
        settings = GroupSettings(chosen.rollout, chosen.erasure, chosen.seed, calibration=self._calibration)
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
            context_limit=self.max_length,
            completion_limit=1,
        )
        return rendered
