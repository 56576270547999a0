"""The two shapes that an answer has: chat completions and text completions, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from e3rl.serve.choices import Piece, ServedChoice
from e3rl.serve.requests import DecodingRequest, read_chat, read_text
from e3rl.serve.service import Running


@dataclass(frozen=True)
class Form:
    """How one endpoint reads a request and words an answer."""

    read: Callable[[Any], DecodingRequest]
    prefix: str
    whole: str
    chunk: str
    content: Callable[[str], dict[str, Any]]
    delta: Callable[[str, bool], dict[str, Any]]


def _chat_delta(text: str, first: bool) -> dict[str, Any]:
    return {"delta": {"role": "assistant", "content": text} if first else {"content": text}}


CHAT = Form(
    read_chat,
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    _chat_delta,
)
TEXT = Form(
    read_text,
    "cmpl",
    "text_completion",
    "text_completion",
    lambda text: {"text": text},
    lambda text, first: {"text": text},
)
FORMS = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}


@dataclass(frozen=True)
class AnswerWriter:
    """Words one answer; all its parts share an id."""

    form: Form
    running: Running
    tokenizer: Any
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        choices = [self._choice(c, self.form.content(c.text), c.finish, self._summary(c)) for c in self.running.choices]
        return {**self._head(self.form.whole), "choices": choices, "usage": self.running.usage()}

    def chunk(self, choice: ServedChoice, piece: Piece) -> dict[str, Any]:
        """A committed segment. The sample's last one says how it ended and sums it up."""
        delta = self.form.delta(piece.text, piece.facts["segment"] == 0)
        facts = piece.facts if choice.finish is None else {**piece.facts, "total": self._summary(choice)}
        return {
            **self._head(self.form.chunk),
            "choices": [self._choice(choice, delta, choice.finish, facts)],
        }

    def usage_chunk(self) -> dict[str, Any]:
        """What closes a stream that was asked for its usage."""
        return {**self._head(self.form.chunk), "choices": [], "usage": self.running.usage()}

    def _head(self, kind: str) -> dict[str, Any]:
        settings = self.running.settings
        return {
            "id": f"{self.form.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.running.request.model,
            "e3rl": {"erase": settings.rollout.erase, "seed": settings.seed},
        }

    def _summary(self, choice: ServedChoice) -> dict[str, Any]:
        return choice.summary(self.tokenizer, erased_texts=self.running.settings.return_erased)

    def _choice(
        self, choice: ServedChoice, content: dict[str, Any], finish: str | None, facts: dict[str, Any]
    ) -> dict[str, Any]:
        return {"index": choice.index, **content, "finish_reason": finish, "logprobs": None, "e3rl": facts}
