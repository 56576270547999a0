"""Row and column means of the papers' tables, as the papers' numbers give them; run it to print them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Tables = dict[str, Any]
FILE = Path(__file__).parent / "means.json"


def _cells(rows: dict[str, Any]) -> Iterator[tuple[str, str, str, float | None]]:
    for row, benchmarks in rows.items():
        for benchmark, values in benchmarks.items():
            for metric, value in values.items():
                yield row, benchmark, metric, value


def means(tables: Tables) -> dict[str, float]:
    """Of every row over its benchmarks, of every benchmark over its rows. A value that is left out counts as -1."""
    sums: dict[str, list[float]] = {}
    for table, models in tables.items():
        for model, rows in models.items():
            for row, benchmark, metric, value in _cells(rows):
                for name in (f"row {row}", f"column {benchmark}"):
                    sums.setdefault(f"{table} | {model} | {name} | {metric}", []).append(-1 if value is None else value)
    return {name: round(sum(values) / len(values), 6) for name, values in sums.items()}


if __name__ == "__main__":
    import e3rl_reproduce

    found = means(json.loads((Path(e3rl_reproduce.__file__).parent / "paper.json").read_text(encoding="utf-8")))
    FILE.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
