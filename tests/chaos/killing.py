"""Runs that are killed again and again until they are complete, and then compared with one that nobody touched."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count


@dataclass(frozen=True)
class Ended:
    """How a life of a run ended: whether the run is complete, what was killed and where, and why that is wrong, if it is."""

    complete: bool
    kills: int = 0
    where: str = ""
    wrong: str = ""
    counts: Counter[str] = field(default_factory=Counter)


@dataclass
class Tally:
    """What was done and what came of it."""

    kills: int = 0
    resumes: int = 0
    runs: int = 0
    identical: int = 0
    wheres: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The figures, for people."""
        return [
            f"kills {self.kills}, resumes {self.resumes}, identical finals {self.identical} of {self.runs}",
            "killed at: " + ", ".join(f"{where} {n}" for where, n in sorted(self.wheres.items())),
            *(f"{what}: {n}" for what, n in sorted(self.counts.items())),
            *self.wrong,
        ]


def kill_runs(
    kills: int,
    live: Callable[[str, int], Ended],
    unlike: Callable[[str], str],
    seconds: float = math.inf,
    say: Callable[[str], None] = print,
) -> Tally:
    """Kill that often, or for so many seconds, and let each run that was begun come to its end.

    ``live(name, left)`` is one life of a run, from its beginning or resumed, which may be killed ``left`` times at most;
    ``unlike(name)`` tells how a complete run is not the undisturbed one, and removes it. A life that ends
    as none should ends all.
    """
    tally, end = Tally(), time.monotonic() + seconds
    while tally.kills < kills and time.monotonic() < end:
        name = f"run-{tally.runs}"
        for lives in count():
            ended = live(name, kills - tally.kills if time.monotonic() < end else 0)
            tally.resumes += lives > 0
            tally.kills += ended.kills
            tally.counts += ended.counts
            if ended.kills:
                tally.wheres[ended.where] += ended.kills
            if ended.wrong:
                tally.wrong.append(f"{name}, {ended.where}: {ended.wrong}")
                return tally
            if ended.complete:
                break
        tally.runs += 1
        wrong = unlike(name)
        tally.identical += not wrong
        tally.wrong += [f"{name} differs in {wrong}"] * bool(wrong)
        say(f"{name}: {tally.kills} kills so far, {tally.wrong[-1] if wrong else 'identical'}")
    return tally
