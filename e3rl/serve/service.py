"""Turns requests into groups for the decoding thread, and committed segments into pieces of answers."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from e3rl.config import Config
from e3rl.data.templates import encode_chats
from e3rl.data.toolcalls import ToolCallFormat, tool_call_format
from e3rl.engine.build import build_engine
from e3rl.environments.episodes import Toolbox
from e3rl.errors import UserError
from e3rl.models import Policy
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.orders import Committed, Drawn, Erased, Event
from e3rl.rollout.statistics import CalibrationStatistics
from e3rl.serve.choices import Piece, ServedChoice, ServedDialogue, usage
from e3rl.serve.errors import ApiError, as_api_error, invalid
from e3rl.serve.fields import table
from e3rl.serve.free_grammars import Grammars
from e3rl.serve.grammar import Grammar, call_grammar
from e3rl.serve.hooks import RowHook
from e3rl.serve.messages import Chat
from e3rl.serve.page import LiveFeed
from e3rl.serve.requests import DecodingRequest
from e3rl.serve.settings import RequestSettings, decoding, runs_tools
from e3rl.serve.text import CallStream, TextStream
from e3rl.serve.worker import DecodingWorker, Failed, Outbox, Ticket
from e3rl.types import Message, Problem, Prompt
from e3rl.web.prometheus import Metrics


@dataclass(frozen=True)
class Running:
    """A request under way."""

    request: DecodingRequest
    settings: RequestSettings
    prompts: tuple[Prompt, ...]
    choices: tuple[ServedChoice, ...]
    outbox: Outbox
    cancelled: threading.Event
    number: int = 0  # on the live page
    client: tuple[str, ...] = ()
    began: float = field(default_factory=time.monotonic)

    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        return usage(sum(len(p.ids) for p in self.prompts), self.choices)


_HELP = {
    "e3rl_requests_total": "Requests answered, by path and status; 499: the client left before the end.",
    "e3rl_prompt_tokens_total": "Tokens of prompts.",
    "e3rl_completion_tokens_total": "Tokens of answers.",
    "e3rl_erased_tokens_total": "Tokens that were generated and erased.",
    "e3rl_erasures_total": "Segments that were erased.",
    "e3rl_segments_total": "Segments of answers.",
    "e3rl_first_segment_seconds": "From a request's arrival to its first segment.",
    "e3rl_request_seconds": "From a request's arrival to its end.",
    "e3rl_groups_decoding": "Groups that have rows.",
    "e3rl_groups_waiting": "Groups that wait for rows.",
    "e3rl_rows_free": "Rows of the KV cache that are free.",
}


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
        live: bool = False,
    ) -> None:
        self.name, self.policy = name, policy
        self._config, self._calibration = config, calibration
        self.max_length = min(max_length, policy.context_length)
        rows = config.rollout.cache_rows or config.rollout.max_rows
        # a row holds prompt and response together; how the two divide it is each request's own affair
        rollout = replace(config.rollout, cache_rows=rows, max_completion_length=1)
        self._engine = build_engine(rollout, policy.model, policy.eos_ids, self.max_length - 1)
        self._worker = DecodingWorker(self._engine, rows=rows, queue_limit=queue_limit)
        self._vocabulary = policy.model.get_input_embeddings().weight.shape[0]
        self.metrics = Metrics(_HELP)
        self.live = LiveFeed(policy.tokenizer) if live else None
        self._tools = None
        if config.environments.factory:
            self._tools = Toolbox(
                config.environments, policy.tokenizer, dict(config.data.chat_template_kwargs), policy.eos_ids
            )
        self.grammars = Grammars(policy.tokenizer, policy.eos_ids, self._vocabulary)

    def close(self) -> None:
        """Stop decoding; requests under way are refused."""
        self._worker.stop()
        self.grammars.close()

    def drain(self) -> bool:
        """Refuse new requests; return whether earlier ones are still under way."""
        return self._worker.drain()

    def load(self) -> dict[str, int]:
        """How much is decoding and waiting, and how many more rows could be taken."""
        return {**self._worker.load(), "free_rows": self._engine.free_rows()}

    def metrics_text(self) -> str:
        """Counts and times so far and the load now, for Prometheus."""
        load = self.load()
        gauges = {f"e3rl_groups_{name}": load[name] for name in ("decoding", "waiting")}
        return self.metrics.text({**gauges, "e3rl_rows_free": load["free_rows"]})

    def start(self, request: DecodingRequest, outbox: Outbox, client: tuple[str, ...] = ()) -> Running:
        """Check a request and queue its groups, whose events go to ``outbox``; ApiError where it can't be served.

        ``client`` names who asks; who asks for several names them in the requests' ``user``."""
        if request.model and request.model != self.name:
            raise ApiError(
                404, f"no model '{request.model}' here, only '{self.name}'", param="model", code="model_not_found"
            )
        if request.n > self._worker.rows:
            raise ApiError(400, f"n = {request.n}, and the server holds {self._worker.rows} rows", param="n")
        try:
            runs = runs_tools(request)
            prompts = tuple(
                self._with_tools(request, i, p) if runs else self._plain(request, i, p)
                for i, p in enumerate(request.prompts)
            )
            room = self.max_length - max(len(p.ids) for p in prompts)
            settings = decoding(request, self._config, self._calibration, room=room)
            running = self._running(request, settings, prompts, outbox, client)
            self._worker.submit([self._ticket(running, i) for i in range(len(prompts))])
        except UserError as error:
            raise as_api_error(error) from None
        return running

    def _plain(self, request: DecodingRequest, index: int, prompt: str | Chat | tuple[int, ...]) -> Prompt:
        return Prompt(Problem(f"prompt-{index}", ""), tuple(self.encode(prompt, request.add_special_tokens)))

    def _with_tools(self, request: DecodingRequest, index: int, chat: str | Chat | tuple[int, ...]) -> Prompt:
        """A conversation whose calls the server's environment answers; what that says first is added to its last message."""
        if self._tools is None:
            raise invalid("e3rl.run_tools", "this server has no tools: it was started without environments.factory")
        assert isinstance(chat, Chat)
        messages = [Message(str(m["role"]), str(m["content"])) for m in chat.messages]
        problem = Problem(f"prompt-{index}", tuple(messages), columns=dict(table(request.extension, "row")))
        *before, last = chat.messages
        told = {**last, "content": str(last["content"]) + self._tools.said(problem)}
        ids = self.encode(Chat((*before, told), tuple(self._tools.schemas), chat.arguments))
        return Prompt(problem, tuple(ids), self._tools)

    async def pieces(self, running: Running) -> AsyncGenerator[tuple[ServedChoice, Piece], None]:
        """Every committed segment with the sample it belongs to, until all samples have ended; ApiError where they can't."""
        told = False
        while any(c.finish is None for c in running.choices):
            message = await running.outbox.get()
            if isinstance(message, Failed):
                raise message.error
            if error := next((c.hook.error for c in running.choices if c.hook and c.hook.error), None):
                raise ApiError(400, f"the answer could not follow its grammar to the end: {error}")
            for found in self._apply(running, *message):
                if not told:
                    self.metrics.observe("e3rl_first_segment_seconds", time.monotonic() - running.began)
                    told = True
                yield found

    def drop(self, running: Running) -> None:
        """The client is gone or served: free its rows and count the outcome."""
        used, choices = running.usage(), running.choices
        for name in ("prompt", "completion", "erased"):
            self.metrics.add(f"e3rl_{name}_tokens_total", used[f"{name}_tokens"])
        self.metrics.add("e3rl_segments_total", sum(c.segments for c in choices))
        self.metrics.add("e3rl_erasures_total", sum(len(c.erasures) for c in choices))
        self.metrics.observe("e3rl_request_seconds", time.monotonic() - running.began)
        running.cancelled.set()
        self._worker.wake()

    def _apply(self, running: Running, prompt: int, event: Event) -> Iterator[tuple[ServedChoice, Piece]]:
        if isinstance(event, Drawn | Committed | Erased):
            choice = running.choices[prompt * running.request.n + event.sibling]
            followed = isinstance(event, Drawn) or choice.ahead > 0
            if self.live is not None and choice.finish is None and not followed:
                self.live.tell(running.number, choice.index, event)
            if isinstance(event, Erased):
                choice.erased(event)
            elif piece := choice.drawn(event) if isinstance(event, Drawn) else choice.committed(event):
                if self.live is not None and followed:
                    self.live.show(running.number, choice.index, piece.facts["segment"], piece.text)
                yield choice, piece
        else:
            for trajectory in event.group.trajectories:
                choice = running.choices[prompt * running.request.n + trajectory.sibling]
                if isinstance(choice, ServedDialogue) and choice.finish is None:
                    yield choice, choice.finished(trajectory)

    def encode(self, prompt: str | Chat | tuple[int, ...], add_special_tokens: bool = True) -> Sequence[int]:
        """A conversation goes through the chat template; a text is encoded, and token ids are taken, as they stand."""
        tokenizer = self.policy.tokenizer
        if isinstance(prompt, tuple):
            return prompt
        if isinstance(prompt, str):
            ids: list[int] = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
            return ids
        if not getattr(tokenizer, "chat_template", None):
            raise invalid("messages", "this model has no chat template; POST /v1/completions takes texts")
        arguments = {**prompt.arguments, **({"tools": list(prompt.tools)} if prompt.tools else {})}
        messages = [dict(message) for message in prompt.messages]
        (found,) = encode_chats(tokenizer, [messages], arguments)
        if isinstance(found, str):
            raise ApiError(400, f"the model's chat template refuses it: {found.removeprefix('data.')}")
        return found

    def _running(
        self,
        request: DecodingRequest,
        settings: RequestSettings,
        prompts: tuple[Prompt, ...],
        outbox: Outbox,
        client: tuple[str, ...],
    ) -> Running:
        form = self._call_format(request)
        limit, output = settings.rollout.completion_limit, request.output
        choices: list[ServedChoice] = []
        for index, prompt in enumerate(p for p in prompts for _ in range(request.n)):
            stream = TextStream(
                self.policy.tokenizer,
                request.stop,
                keep_stop=output.keep_stop,
                keep_special=output.keep_special or form is not None,
            )
            if prompt.tools is not None:
                choices.append(ServedDialogue(index, limit, stream, tools=prompt.tools))
                continue
            choice = ServedChoice(index, limit, stream, frozenset(request.stop_ids), output.keep_stop)
            choice.hook = self._hook(request, settings, prompt, client[0] if client else "")
            choice.call_stream = CallStream(form, request.tools) if form else None
            choices.append(choice)
        number = self.live.number() if self.live else 0
        cancelled, who = threading.Event(), (*client, request.user)
        return Running(request, settings, prompts, tuple(choices), outbox, cancelled, number, who)

    def grammar(self, request: DecodingRequest) -> Grammar | None:
        """What answers have to follow: what the client asks for, or the calls that are forced."""
        form = self._call_format(request)
        if form and request.tools.forced:
            return call_grammar(form, request.tools.forced, several=request.tools.parallel)
        return request.shaping.grammar

    def _call_format(self, request: DecodingRequest) -> ToolCallFormat | None:
        """How the model writes tool calls, where the request has tools."""
        if not request.tools.tools:
            return None
        if self._model_call_format is None:
            raise invalid(
                "tools", "this model's chat template has no tool calls, or writes them in a format unknown here"
            )
        return self._model_call_format

    @cached_property
    def _model_call_format(self) -> ToolCallFormat | None:
        template = getattr(self.policy.tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("tool_use") or template.get("default")
        return tool_call_format(template) if template else None

    def _hook(self, request: DecodingRequest, settings: RequestSettings, prompt: Prompt, who: str) -> RowHook | None:
        """What changes or reads this sample's logits; None where nothing does."""
        shaping, top = replace(request.shaping, grammar=self.grammar(request)), request.output.logprobs or 0
        if not RowHook.needed(shaping, top):
            return None
        if not hasattr(self._engine, "drawn"):  # no `ServingEngine`
            raise ApiError(
                400,
                "this server's engine can't change logits: penalties, logit_bias, min_tokens, ignore_eos, top_logprobs, "
                "response_format and forced tool calls need rollout.engine = 'torch'",
            )
        if bad := next((token for token, _ in shaping.bias if token >= self._vocabulary), None):
            raise invalid("logit_bias", f"token id {bad}, and the model's vocabulary has {self._vocabulary}")
        return RowHook(
            shaping,
            prompt.ids,
            self.policy.eos_ids,
            top=top,
            temperature=settings.rollout.temperature,
            matcher=self.grammars.matcher(shaping.grammar, who) if shaping.grammar else None,
        )

    def _ticket(self, running: Running, index: int) -> Ticket:
        chosen, n = running.settings, running.request.n
        hooks = [c.hook for c in running.choices[index * n : (index + 1) * n] if c.hook is not None]
        settings = GroupSettings(
            chosen.rollout,
            chosen.erasure,
            chosen.seed,
            calibration=self._calibration,
            min_p=running.request.min_p,
            hooks=tuple(hooks),
        )
        settings.check()
        prompt, follow = running.prompts[index], self._follows(running)
        return Ticket(prompt, settings, index, running.outbox, running.cancelled, running.client, follow)

    def _follows(self, running: Running) -> bool:
        """Whether tokens are looked at as they are drawn: nothing will erase them, and somebody wants them or may stop them."""
        request = running.request
        wanted = request.stream or bool(request.stop or request.stop_ids)
        return wanted and not running.settings.rollout.erase and hasattr(self._engine, "drawn")
