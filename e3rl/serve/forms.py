"""Response formats: chat completions, text completions, token ids; whole and streamed."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from e3rl.data.toolcalls import ToolCall
from e3rl.serve.choices import Piece, ServedChoice, Tokens
from e3rl.serve.requests import DecodingRequest, read_chat, read_generate, read_text
from e3rl.serve.service import Running


@dataclass(frozen=True)
class Form:
    """The request reader and the response format of one endpoint."""

    read: Callable[[Any], DecodingRequest]
    prefix: str
    whole: str
    chunk: str
    content: Callable[[ServedChoice], dict[str, Any]]
    delta: Callable[[Piece, bool], dict[str, Any]]
    logprobs: Callable[[Tokens, Callable[[int], str], int], dict[str, Any]]


def _chat_content(choice: ServedChoice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.calls:
        message |= {"content": choice.text or None, "tool_calls": [_call(c) for c in choice.calls]}
    return {"message": message}


def _chat_delta(piece: Piece, first: bool) -> dict[str, Any]:
    delta: dict[str, Any] = {"role": "assistant"} if first else {}
    delta["content"] = piece.text
    if piece.calls:
        delta["tool_calls"] = [{"index": i, **_call(c)} for i, c in enumerate(piece.calls)]
    return {"delta": delta}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _chat_logprobs(tokens: Tokens, text: Callable[[int], str], top: int) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        written = text(token)
        return {"token": written, "logprob": logprob, "bytes": list(written.encode(errors="replace"))}

    rows = zip(tokens.ids, tokens.logprobs, tokens.likeliest, strict=True)
    content = [
        {**entry(token, logprob), "top_logprobs": [entry(*pair) for pair in likeliest]}
        for token, logprob, likeliest in rows
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(tokens: Tokens, text: Callable[[int], str], top: int) -> dict[str, Any]:
    written = [text(i) for i in tokens.ids]
    offsets = list(accumulate(map(len, written), initial=0))[:-1]
    likeliest = [{text(i): logprob for i, logprob in place} for place in tokens.likeliest]
    return {
        "tokens": written,
        "token_logprobs": tokens.logprobs,
        "top_logprobs": likeliest if top else None,
        "text_offset": offsets,
    }


CHAT = Form(
    read_chat, "chatcmpl", "chat.completion", "chat.completion.chunk", _chat_content, _chat_delta, _chat_logprobs
)
TEXT = Form(
    read_text,
    "cmpl",
    "text_completion",
    "text_completion",
    lambda choice: {"text": choice.text},
    lambda piece, first: {"text": piece.text},
    _text_logprobs,
)
GENERATE = Form(
    read_generate, "gen", "generate", "generate", lambda choice: {}, lambda piece, first: {}, _chat_logprobs
)
FORMS = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT, "/inference/v1/generate": GENERATE}


@dataclass(frozen=True)
class AnswerWriter:
    """Formats one answer; all its parts share an id."""

    form: Form
    running: Running
    tokenizer: Any
    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        choices = [
            self._choice(c, self.form.content(c), c.finish, c.tokens, self._summary(c), first=True)
            for c in self.running.choices
        ]
        head = self._head(self.form.whole)
        return {**head, **self._prompt_ids(), "choices": choices, "usage": self.running.usage()}

    def chunk(self, choice: ServedChoice, piece: Piece) -> str:
        """A committed segment, or a part of a plain one, as JSON. The sample's last one says how it ended and sums it up."""
        first = piece.first
        facts = piece.facts if choice.finish is None else {**piece.facts, "total": self._summary(choice)}
        made = self._choice(choice, self.form.delta(piece, first), choice.finish, piece.tokens, facts, first=first)
        prompt = self._prompt_ids() if first else {}
        return json.dumps({**self._head(self.form.chunk), **prompt, "choices": [made]})

    def usage_chunk(self) -> str:
        """The last chunk of a stream that was asked for usage."""
        return json.dumps({**self._head(self.form.chunk), "choices": [], "usage": self.running.usage()})

    def _head(self, kind: str) -> dict[str, Any]:
        settings = self.running.settings
        name = f"{self.form.prefix}-{self.id}"
        return {
            "id": name,
            **({"request_id": name} if self.form is GENERATE else {}),
            "object": kind,
            "created": self.created,
            "model": self.model,
            "e3rl": {"erase": settings.rollout.erase, "seed": settings.seed},
        }

    def _prompt_ids(self) -> dict[str, Any]:
        """The one prompt's ids, beside the choices, except where there may be several prompts."""
        if not self.running.request.output.token_ids or self.form is TEXT:
            return {}
        return {"prompt_token_ids": list(self.running.prompts[0].ids)}

    def _summary(self, choice: ServedChoice) -> dict[str, Any]:
        return choice.summary(self.tokenizer, erased_texts=self.running.settings.return_erased)

    def _choice(
        self,
        choice: ServedChoice,
        content: dict[str, Any],
        finish: str | None,
        tokens: Tokens,
        facts: dict[str, Any],
        *,
        first: bool,
    ) -> dict[str, Any]:
        request = self.running.request
        output = request.output
        logprobs = None
        if output.logprobs is not None:
            logprobs = self.form.logprobs(tokens, self._token_text, output.logprobs)
        made = {"index": choice.index, **content, "finish_reason": finish, "logprobs": logprobs}
        if choice.stop_reason is not None:
            made["stop_reason"] = choice.stop_reason
        if output.token_ids:
            made["token_ids"] = tokens.ids
            if self.form is TEXT and first:
                made["prompt_token_ids"] = list(self.running.prompts[choice.index // request.n].ids)
        return {**made, "e3rl": facts}

    def _token_text(self, token: int) -> str:
        if self.running.request.output.tokens_as_ids:
            return f"token_id:{token}"
        return str(self.tokenizer.decode([token]))
