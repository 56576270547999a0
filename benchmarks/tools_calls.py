"""Which calls a run of benchmarks/tools.py erased: how U separates wrong from right ones, and what came instead.

    python benchmarks/tools.py --json out.json --tokens 80000 --prompts 8 --limit 32 --books late --runs RUNS
    python benchmarks/tools_calls.py RUNS/late-*

Read from the runs' ledgers. A call counts while the books are open, and is right where it books the sum that follows from the
one booked before it, right or not: the mistake is the call that made it, not those after it. A call that can't be read is wrong.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from e3rl.diagnose.statistics import Estimate, within_prefix_auroc
from e3rl.lab.books import steps

BOOKINGS = 5
"""Of a problem of level 2 or 4."""
_MARKS = re.compile(r"<\|\w+\|>")
_QUESTION = re.compile(r"[a-z]{3}\d\d[+-]\d:")
SIGNALS = {"U (mean ε)": "u", "mean entropy": "entropy", "−mean log π": "surprise"}


@dataclass(frozen=True)
class Call:
    """A drawn call. ``erased``: 'A' before it was made, 'B' with its result. ``so_far``: all calls before it were right.

    ``again``: it was taken back with its result, and what was drawn in its place says the same.
    """

    problem: str
    prefix: str
    right: bool
    so_far: bool
    retry: bool
    erased: str | None
    again: bool
    u: float
    entropy: float
    surprise: float


def calls_of(row: Mapping[str, Any]) -> Iterator[Call]:
    """The calls of one row of a ledger, erased ones included."""
    [question] = _QUESTION.findall(row["prompt"])
    texts, sizes = [s["text"] for s in row["segments"]], [len(s["ids"]) for s in row["segments"]]
    starts = np.cumsum([0, *sizes]).tolist()
    begins = {0, *(end for end, s in zip(starts[1:], row["segments"], strict=True) if s["observation"])}
    for candidate, kept in [*((s, True) for s in row["segments"]), *((e, False) for e in row["erasures"])]:
        if (
            candidate["start"] not in begins
            or (kept and candidate["observation"])
            or "<tool_call>" not in candidate["text"]
        ):
            continue
        before = _MARKS.sub("", "".join(texts[: starts.index(candidate["start"])]))
        earlier = steps(question, row["answer"], before)
        found = steps(question, row["answer"], before + _MARKS.sub("", candidate["text"]))
        if len(earlier) >= BOOKINGS:  # the books are closed
            continue
        by_result = not kept and bool(candidate["observation"])
        yield Call(
            problem=row["problem_id"],
            prefix=f"{row['step']} {row['problem_id']} {before}",
            right=len(found) == len(earlier) + 1 and found[-1].right,
            so_far=all(step.right for step in earlier),
            retry=bool(candidate["attempt"]) and not by_result,
            erased=None if kept else "B" if by_result else "A",
            again=by_result and _MARKS.sub("", replacement(row, candidate)) == _MARKS.sub("", candidate["text"]),
            u=float(np.mean(candidate["perturbations"])),  # what U is in tools-demo
            entropy=float(np.mean(candidate["entropies"])),
            surprise=-float(np.mean(candidate["logprobs"])),
        )


def replacement(row: Mapping[str, Any], erased: Mapping[str, Any]) -> str:
    """What was drawn in place of a turn that was taken back: the next that was, or what stayed."""
    turns = [e for e in row["erasures"] if e["observation"] and e["start"] == erased["start"]]
    later = turns[turns.index(erased) + 1 :]
    stayed = (s for s in row["segments"] if s["start"] == erased["start"] and not s["observation"])
    return str((later[0] if later else next(stayed))["text"])


def read(run: Path) -> list[Call]:
    """All calls of a run."""
    tables = (pq.read_table(path).to_pylist() for path in sorted((run / "rollouts").glob("step-*.parquet")))
    return [call for rows in tables for row in rows for call in calls_of(row)]


def share(answers: Sequence[bool]) -> str:
    """Share of the answers that are yes."""
    return f"{np.mean(answers):.2f}" if answers else "–"


def separation(calls: Iterable[Call], signal: str) -> Estimate:
    """AUROC within prefix for wrong calls, over first draws alone: whether more are drawn depends on the signal."""
    first = [call for call in calls if not call.retry]
    scores, prefix, problem = (np.array([getattr(c, name) for c in first]) for name in (signal, "prefix", "problem"))
    return within_prefix_auroc(scores, np.array([not c.right for c in first]), prefix, problem)


def column(calls: Sequence[Call]) -> dict[str, str]:
    """One level's figures, all its runs together."""
    first = [c for c in calls if not c.retry]
    wrong = [c for c in first if not c.right]
    kept = [c.right for c in calls if c.retry and c.erased is None]
    found = {"calls drawn": str(len(calls))}
    for title, field in SIGNALS.items():
        e = separation(calls, field)
        found[f"AUROC within prefix of {title}"] = f"{e.value:.3f} ({e.low:.3f}–{e.high:.3f})"
    found["right first draws"] = share([c.right for c in first])
    found["wrong first draws with U = 0"] = share([c.u == 0 for c in wrong])
    for how, name in {"A": "before the call", "B": "with the result"}.items():
        erased = [c for c in calls if c.erased == how]
        found[f"erased {name}"] = str(len(erased))
        found[f"… right themselves, {name}"] = share([c.right for c in erased])
        found[f"… after a wrong call, {name}"] = share([not c.so_far for c in erased])
        found[f"wrong first draws erased {name}"] = share([c.erased == how for c in wrong])
    found["drawn again with the same call"] = share([c.again for c in calls if c.erased == "B"])
    return {**found, "kept retries": str(len(kept)), "right kept retries": share(kept)}


def table(levels: Mapping[str, Sequence[Call]]) -> str:
    """A row for each figure, a column for each level."""
    columns = [column(calls) for calls in levels.values()]
    lines = [f"| | {' | '.join(levels)} |", "| --- " * (len(levels) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(c[name] for c in columns)} |" for name in columns[0])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    levels: dict[str, list[Call]] = {}
    for run in options.runs:
        levels.setdefault(run.name.rsplit("-", 1)[0], []).extend(read(run))
    print(table(levels))


if __name__ == "__main__":
    main()
