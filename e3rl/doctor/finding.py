"""The result of one check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CheckResult:
    """``kind``: 'ok', 'note' (worth knowing) or 'problem'. ``repair`` fixes it, if that is safe."""

    kind: Literal["ok", "note", "problem"]
    subject: str
    text: str
    repair: Callable[[], None] | None = None
