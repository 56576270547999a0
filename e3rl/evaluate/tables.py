"""Evaluation results as a terminal table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def results_table(title: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Labelled evaluation records, one a row, in the order given."""
    k = rows[0][1]["samples"]
    table = Table(title=title, title_justify="left")
    table.add_column("decoding", no_wrap=True)
    for column in (f"Avg@{k}", "95 %", f"Pass@{k}", "95 %", "finished", "r"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, record in rows:
        table.add_row(
            label,
            f"{record[f'avg@{k}']:.3f}",
            _interval(record["ci95"]),
            f"{record[f'pass@{k}']:.3f}",
            _interval(record["pass_ci95"]),
            f"{record['finish_ratio']:.2f}",
            f"{record['r']:.2f}",
        )
    return table


def _interval(bounds: Sequence[float]) -> str:
    low, high = bounds
    return f"{low:.2f}–{high:.2f}"
