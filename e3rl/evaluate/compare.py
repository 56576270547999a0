"""Two evaluations on the same problems: differences problem by problem, with intervals and p-values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from e3rl.errors import UserError
from e3rl.evaluate.figures import correct_table, majority
from e3rl.evaluate.metrics import KS, Difference, avg_at_k, paired_difference, pass_at_k_by_problem
from e3rl.evaluate.samples import Sample, by_problem
from e3rl.evaluate.store import SampleStore, differences
from e3rl.evaluate.tables import difference_cells


@dataclass(frozen=True)
class FigureDifference:
    """One figure of both sides, and A minus B."""

    a: float
    b: float
    difference: Difference


def compare(a: Path, b: Path, modes: tuple[str, str] = ("plain", "plain")) -> dict[str, FigureDifference]:
    """Avg, and Pass@k and Maj@k for every power of two that both have samples for, by name."""
    left, right = (_samples(path, mode) for path, mode in zip((a, b), modes, strict=True))
    _require_same_problems(a, b)
    problems = sorted({s.problem for s in left})
    if set(problems) != {s.problem for s in right}:
        raise UserError(f"{a} and {b} have samples of different problems: finish both evaluations first")
    tables = [_rectangle(by_problem(side, problems)) for side in (left, right)]
    correct = [correct_table(table) for table in tables]
    found = {"Avg": _row(avg_at_k(correct[0]), avg_at_k(correct[1]))}
    most = min(c.shape[1] for c in correct)
    for k in sorted({k for k in KS if 1 < k <= most} | {most} - {1}):
        found[f"Pass@{k}"] = _row(pass_at_k_by_problem(correct[0], k), pass_at_k_by_problem(correct[1], k))
        found[f"Maj@{k}"] = _row(majority(tables[0], k), majority(tables[1], k))
    return found


def _row(a_P: np.ndarray, b_P: np.ndarray) -> FigureDifference:
    return FigureDifference(float(a_P.mean()), float(b_P.mean()), paired_difference(a_P, b_P))


def _samples(path: Path, mode: str) -> list[Sample]:
    if not path.is_dir():
        raise UserError(f"there is no directory {path}; e3rl eval … --output DIR makes one")
    store = SampleStore(path)
    if store.identity() is None:
        raise UserError(f"{path} holds no evaluation: e3rl eval … --output DIR makes one")
    found = [s for s in store.samples() if s.mode == mode]
    if not found:
        raise UserError(
            f"{path} holds no {mode} samples{' (e3rl eval … --erase makes them)' if mode == 'erasable' else ''}"
        )
    return found


def _require_same_problems(a: Path, b: Path) -> None:
    left, right = (((SampleStore(path).identity() or {}).get("data") or {}) for path in (a, b))
    if left.get("answers") != right.get("answers"):
        words = "; ".join(
            differences(
                {k: left.get(k) for k in ("source", "problems")}, {k: right.get(k) for k in ("source", "problems")}
            )
        )
        raise UserError(
            f"{a} and {b} are evaluations on different problems ({words or 'their ids or answers differ'}): nothing to pair"
        )


def _rectangle(table: list[list[Sample]]) -> list[list[Sample]]:
    """The same number of samples of each problem: extra samples of an equal budget may exist for some problems."""
    fewest = min(len(row) for row in table)
    return [row[:fewest] for row in table]


def comparison_table(title: str, found: Mapping[str, Any]) -> Table:
    """The comparison for a terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in ("A", "B", "difference", "95 %", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in found.items():
        difference = {"mean": row.difference.mean, "interval": row.difference.interval, "p": row.difference.p}
        table.add_row(name, f"{row.a:.3f}", f"{row.b:.3f}", *difference_cells(difference))
    table.caption = (
        "Differences between problems' means; p: two-sided paired randomisation test, not corrected for several rows."
    )
    table.caption_justify = "left"
    return table
