"""Counters and histograms in Prometheus' text format."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper ends of a histogram's buckets."""


@dataclass
class _Seconds:
    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0


class Metrics:
    """Counters and histograms of seconds, by name and labels, each name with its ``help``. Threads may share it."""

    def __init__(self, help: Mapping[str, str]) -> None:
        self._help = help
        self._counters: dict[tuple[str, str], float] = {}
        self._seconds: dict[str, _Seconds] = {}
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Count something."""
        key = (name, ",".join(f'{k}="{v}"' for k, v in sorted(labels.items())))
        with self._lock:
            self._counters[key] = self._counters.get(key, 0) + amount

    def count(self, name: str) -> float:
        """What was counted under a name without labels."""
        with self._lock:
            return self._counters.get((name, ""), 0)

    def observe(self, name: str, seconds: float) -> None:
        """Note how long something took."""
        with self._lock:
            found = self._seconds.setdefault(name, _Seconds())
            found.counts[bisect.bisect_left(SECONDS, seconds)] += 1
            found.total += seconds

    def text(self, gauges: Mapping[str, float]) -> str:
        """Everything as text, with ``gauges``, the current values."""
        with self._lock:
            names = [*dict.fromkeys(name for name, _ in self._counters)]
            lines = [line for name in names for line in self._of_counter(name)]
            lines += [line for name in self._seconds for line in self._of_seconds(name)]
        for name, value in gauges.items():
            lines += [*self._head(name, "gauge"), f"{name} {value:g}"]
        return "\n".join(lines) + "\n"

    def _head(self, name: str, kind: str) -> Sequence[str]:
        return f"# HELP {name} {self._help[name]}", f"# TYPE {name} {kind}"

    def _of_counter(self, name: str) -> list[str]:
        rows = [(labels, value) for (other, labels), value in self._counters.items() if other == name]
        return [*self._head(name, "counter"), *(f"{name}{_braced(labels)} {value:.15g}" for labels, value in rows)]

    def _of_seconds(self, name: str) -> list[str]:
        found, below = self._seconds[name], 0
        lines = [*self._head(name, "histogram")]
        for end, count in zip((*map(str, SECONDS), "+Inf"), found.counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{le="{end}"}} {below}')
        return [*lines, f"{name}_sum {found.total:.9g}", f"{name}_count {below}"]


def _braced(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""
