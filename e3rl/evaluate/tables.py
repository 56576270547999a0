"""Evaluation results as terminal tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text


def results_table(title: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Labelled evaluation records, one in each row, in the order given."""
    k = rows[0][1]["samples"]
    table = Table(title=Text(title), title_justify="left")  # ":books:" would be an emoji
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


def cost_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Format, length and cost: tokens generated in all and for each right answer, including erased ones."""
    table = Table(title="Form and cost", title_justify="left")
    table.add_column("decoding", no_wrap=True)
    tools = any("calls" in record for _, record in rows)
    for column in (
        "boxed",
        "length",
        *(["calls: failed"] if tools else []),
        "erase rate",
        "tokens",
        "tokens per right answer",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for label, record in rows:
        cost = record["tokens_per_correct"]
        table.add_row(
            label,
            f"{record['boxed']:.2f}",
            f"{record['length']:.0f}",
            *([f"{record.get('calls', 0):.1f}: {record.get('call_errors', 0):.0%}"] if tools else []),
            f"{record['erase_rate']:.3f}",
            str(record["tokens"]),
            "none is right" if cost is None else f"{cost:.0f}",
        )
    return table


def curves_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Pass@k and Maj@k for every k that was reported."""
    table = Table(title="By number of samples", title_justify="left")
    table.add_column("", no_wrap=True)
    for k in rows[0][1]["pass"]:
        table.add_column(f"k = {k}", justify="right", no_wrap=True)
    for label, record in rows:
        for name, key in (("Pass", "pass"), ("Maj", "maj")):
            table.add_row(f"{name}, {label}", *(f"{point['value']:.3f}" for point in record[key].values()))
    return table


def budget_table(budget: Mapping[str, Any]) -> Table:
    """Erasable decoding beside plain decoding with as many tokens."""
    table = Table(
        title=f"At {budget['tokens_per_problem']:.0f} tokens a problem: {budget['erasable_samples']} erasable samples, "
        f"{budget['plain_samples']:.2f} plain ones",
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    for column in ("erasable", "plain", "difference", "95 %", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, key in (("Avg", "avg"), ("Pass", "pass"), ("Maj", "maj")):
        row = budget[key]
        table.add_row(name, f"{row['erasable']:.3f}", f"{row['plain']:.3f}", *difference_cells(row["difference"]))
    return table


def difference_cells(difference: Mapping[str, Any]) -> tuple[str, str, str]:
    """Mean, interval and p-value of a paired difference."""
    p = difference["p"]
    low, high = difference["interval"]
    return f"{difference['mean']:+.3f}", f"{low:+.2f} to {high:+.2f}", "<0.001" if p < 0.001 else f"{p:.3f}"


def _interval(bounds: Sequence[float]) -> str:
    low, high = bounds
    return f"{low:.2f}–{high:.2f}"
