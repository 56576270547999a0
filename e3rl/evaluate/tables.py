"""Evaluation results as a terminal table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def results_table(title: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Labelled evaluation records, one a row, in the order given."""
    k = rows[0][1]["samples"]
    table = Table(title=title, title_justify="left")
    table.add_column("decoding")
    for column in (f"Avg@{k}", "95 % interval", f"Pass@{k}", "95 % interval", "finished", "r", "tokens"):
        table.add_column(column, justify="right")
    for label, record in rows:
        (low, high), (pass_low, pass_high) = record["ci95"], record["pass_ci95"]
        table.add_row(
            label,
            f"{record[f'avg@{k}']:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{record[f'pass@{k}']:.3f}",
            f"{pass_low:.3f} to {pass_high:.3f}",
            f"{record['finish_ratio']:.3f}",
            f"{record['r']:.3f}",
            str(record["tokens"]),
        )
    return table
