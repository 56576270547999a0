"""The state of one sample of a request: text, tokens, tool calls, counts, and how it ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from e3rl.data.toolcalls import ToolCall
from e3rl.environments.episodes import Toolbox
from e3rl.rollout.orders import Committed, Drawn, Erased
from e3rl.serve.hooks import RowHook
from e3rl.serve.text import CallStream, TextStream
from e3rl.types import Erasure, Judgement, Observed, Segment, Trajectory


@dataclass(frozen=True)
class Tokens:
    """Token ids with their log-probabilities, and at each place the likeliest tokens that were asked for."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)

    def extend(self, more: Tokens) -> None:
        """Add those of the next segment."""
        self.ids.extend(more.ids)
        self.logprobs.extend(more.logprobs)
        self.likeliest.extend(more.likeliest)

    def first(self, count: int) -> Tokens:
        """Some of them."""
        return Tokens(self.ids[:count], self.logprobs[:count], self.likeliest[:count])


@dataclass(frozen=True)
class Piece:
    """What a committed segment, or a part of a plain one, adds to a sample. Calls come with the last."""

    text: str
    tokens: Tokens
    calls: list[ToolCall]
    facts: dict[str, Any]
    first: bool  # of the sample


@dataclass
class ServedChoice:
    """Collects the events of one sample. A sample that met a stop string takes no more."""

    index: int
    limit: int
    stream: TextStream
    stop_ids: frozenset[int] = frozenset()
    keep_stop: bool = False
    hook: RowHook | None = None
    call_stream: CallStream | None = None
    texts: list[str] = field(default_factory=list)
    tokens: Tokens = field(default_factory=Tokens)
    calls: list[ToolCall] = field(default_factory=list)
    segments: int = 0
    ahead: int = 0  # tokens of a plain segment under way that are in already
    erasures: list[Erasure] = field(default_factory=list)
    finish: Literal["stop", "length", "tool_calls"] | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def erased_tokens(self) -> int:
        return sum(len(e.candidate.ids) for e in self.erasures)

    def erased(self, event: Erased) -> None:
        """A candidate was dropped."""
        if self.finish is None:
            self.erasures.append(event.erasure)

    def committed(self, event: Committed) -> Piece | None:
        """The response grew by a segment; None where the sample had ended."""
        if self.finish is not None:
            return None
        candidate, ahead = event.segment.candidate, self.ahead
        ids, logprobs = candidate.ids[ahead:].tolist(), candidate.logprobs[ahead:].tolist()
        judgement = event.segment.judgement
        attempts = sum(e.index == event.segment.index for e in self.erasures)
        piece = self._grown(ids, logprobs, event.segment.index, attempts, ended=candidate.ended)
        self.ahead = 0
        if judgement is not None:
            piece.facts.update(_judged(judgement))
        return piece

    def drawn(self, event: Drawn) -> Piece | None:
        """A plain segment under way grew; None where the sample had ended."""
        if self.finish is not None:
            return None
        piece = self._grown(event.ids, event.logprobs, self.segments - bool(self.ahead), 0, ended=False)
        self.ahead += len(event.ids)
        return piece

    def _grown(self, ids: list[int], logprobs: list[float], segment: int, attempts: int, *, ended: bool) -> Piece:
        """Add tokens of a segment."""
        start, first = len(self.tokens.ids), not self.texts
        likeliest = self.hook.likeliest(start, start + len(ids)) if self.hook else [[] for _ in ids]
        tokens = Tokens(ids, logprobs, likeliest)
        self.segments += not self.ahead
        text, kept = self._text(tokens.ids, ended=ended)
        self.tokens.extend(tokens.first(kept))
        if self.call_stream is not None:
            text, self.calls = self.call_stream.add(text, last=self.finish is not None)
            if self.calls and self.finish == "stop":
                self.finish = "tool_calls"
        self.texts.append(text)
        facts: dict[str, Any] = {"segment": segment, "tokens": kept, "erasures": attempts}
        return Piece(text, tokens.first(kept), self.calls, facts, first)

    def _text(self, ids: list[int], *, ended: bool) -> tuple[str, int]:
        """The text of these tokens and how many of them are the sample's; sets how it ended, if it did."""
        before = len(self.tokens.ids)
        at = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        if at is not None:
            ids, self.finish, self.stop_reason = ids[: at + 1], "stop", ids[at]
        elif ended:
            self.finish = "stop"
        elif before + len(ids) == self.limit:
            self.finish = "length"
        shown = ids[:-1] if self.finish == "stop" and not self.keep_stop else ids
        text = self.stream.add(shown, last=self.finish is not None)
        if self.stream.stopped is None:
            return text, len(ids)
        self.finish, self.stop_reason = "stop", self.stream.stopped
        return text, self.stream.kept - before

    def summary(self, tokenizer: Any, *, erased_texts: bool) -> dict[str, Any]:
        """The extension field of a whole sample."""
        facts: dict[str, Any] = {
            "segments": self.segments,
            "erasures": len(self.erasures),
            "erased_tokens": self.erased_tokens,
        }
        if erased_texts:
            facts["erased"] = [_erasure(e, tokenizer) for e in self.erasures]
        return facts


@dataclass
class ServedDialogue(ServedChoice):
    """A sample whose tool calls are run here. A turn is shown once its calls were answered: until then it may be erased."""

    tools: Toolbox | None = None
    turn: list[Segment] = field(default_factory=list)  # that is not answered
    answered: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None

    def erased(self, event: Erased) -> None:
        super().erased(event)
        if event.erasure.observation is not None:
            self.turn.clear()
            self.answered += _results(event.erasure.observation, erased=True)

    def committed(self, event: Committed) -> Piece | None:
        self.segments += 1
        if event.segment.observation is None:
            self.turn.append(event.segment)
            return None
        self.answered += (found := _results(event.segment.observation, erased=False))
        return self._shown(found)

    def drawn(self, event: Drawn) -> Piece | None:
        return None

    def finished(self, trajectory: Trajectory) -> Piece:
        """What is left to show."""
        self.finish, self.failure = trajectory.finish, trajectory.failure
        return self._shown([])

    def _shown(self, results: list[dict[str, Any]]) -> Piece:
        assert self.tools is not None
        ids = [i for segment in self.turn for i in segment.candidate.ids.tolist()]
        logprobs = [p for segment in self.turn for p in segment.candidate.logprobs.tolist()]
        text = self.tools.dialogue.text(ids)
        if text and self.text:
            text = "\n" + text
        tokens = Tokens(ids, logprobs, [[] for _ in ids])
        first = not self.texts
        facts = {"segment": len(self.texts), "tokens": len(ids), "erasures": len(self.erasures), "calls": results}
        self.tokens.extend(tokens)
        self.texts.append(text)
        self.turn.clear()
        return Piece(text, tokens, [], facts, first)

    def summary(self, tokenizer: Any, *, erased_texts: bool) -> dict[str, Any]:
        failed = {"failure": f"its environment {self.failure}"} if self.failure else {}
        return {**super().summary(tokenizer, erased_texts=erased_texts), "calls": self.answered, **failed}


def _results(observation: Observed, *, erased: bool) -> list[dict[str, Any]]:
    """Calls with their results, as the answer's extension field has them."""
    return [{**asdict(call), "erased": erased} for call in observation.calls]


def _erasure(erasure: Erasure, tokenizer: Any) -> dict[str, Any]:
    text = tokenizer.decode(erasure.candidate.ids.tolist())
    return {"segment": erasure.index, "text": text, **_judged(erasure.judgement)}


def _judged(judgement: Judgement) -> dict[str, float | None]:
    """U and threshold. JSON has no infinity: a threshold that nothing exceeds is null."""
    found = {"uncertainty": judgement.uncertainty.total, "threshold": judgement.threshold.total}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def usage(prompt_tokens: int, choices: Sequence[ServedChoice]) -> dict[str, int]:
    """Tokens of a request. Erased tokens, which are in no answer, are counted apart."""
    completion = sum(len(c.tokens.ids) for c in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "erased_tokens": sum(c.erased_tokens for c in choices),
    }
