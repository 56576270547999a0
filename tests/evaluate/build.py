"""Samples made by hand."""

from __future__ import annotations

from typing import Any

from e3rl.evaluate.samples import Sample

PLAIN = Sample(
    problem="p", mode="plain", round=0, sample=0, gold="4", pred="4", answer="4", correct=True, reason=None, boxed=False,
    finish="stop", tokens=10, generated=10, erasures=0, segments=2,
)  # fmt: skip


def sample(problem: str, number: int, **changes: Any) -> Sample:
    """A right plain sample of 10 tokens, but for ``changes``."""
    values = {name: getattr(PLAIN, name) for name in PLAIN.__slots__}
    return Sample(**{**values, "problem": problem, "sample": number, **changes})
