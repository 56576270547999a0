"""One thing that was looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CheckResult:
    """``kind``: 'ok', 'note' (worth knowing) or 'problem'. ``repair`` puts it right, where that is safe."""

    kind: Literal["ok", "note", "problem"]
    subject: str
    text: str
    repair: Callable[[], None] | None = None
