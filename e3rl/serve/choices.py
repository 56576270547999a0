"""What one sample of a request has come to: its text, its counts, how it ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from e3rl.rollout.group import Committed, Erased
from e3rl.serve.text import TextStream
from e3rl.types import Erasure, Judgement


@dataclass(frozen=True)
class Piece:
    """What a committed segment adds to a sample."""

    text: str
    facts: dict[str, Any]


@dataclass
class ServedChoice:
    """Collects the events of one sample. A sample that met a stop string takes no more."""

    index: int
    limit: int
    stream: TextStream
    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    segments: int = 0
    erasures: list[Erasure] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None

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
        """The response grew; None where the sample has ended before."""
        if self.finish is not None:
            return None
        candidate = event.segment.candidate
        self.tokens += len(candidate.ids)
        self.segments += 1
        full = self.tokens == self.limit
        text = self.stream.add(candidate.ids.tolist(), last=candidate.ended or full)
        self.texts.append(text)
        if candidate.ended or self.stream.stopped:
            self.finish = "stop"
        elif full:
            self.finish = "length"
        judgement = event.segment.judgement
        attempts = sum(e.index == event.segment.index for e in self.erasures)
        facts: dict[str, Any] = {"segment": event.segment.index, "tokens": len(candidate.ids), "erasures": attempts}
        if judgement is not None:
            facts |= _judged(judgement)
        return Piece(text, facts)

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


def _erasure(erasure: Erasure, tokenizer: Any) -> dict[str, Any]:
    text = tokenizer.decode(erasure.candidate.ids.tolist())
    return {"segment": erasure.index, "text": text, **_judged(erasure.judgement)}


def _judged(judgement: Judgement) -> dict[str, float | None]:
    """U and threshold. JSON has no infinity: a threshold that nothing exceeds is null."""
    found = {"uncertainty": judgement.uncertainty.total, "threshold": judgement.threshold.total}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def usage(prompt_tokens: int, choices: Sequence[ServedChoice]) -> dict[str, int]:
    """Tokens of a request. Erased ones are counted apart: they were generated and are in no answer."""
    completion = sum(c.tokens for c in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "erased_tokens": sum(c.erased_tokens for c in choices),
    }
