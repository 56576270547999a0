"""Tables and plots as values, and how they are written: Markdown, CSV, PNG and SVG."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from e3rl.files import write_text


@dataclass(frozen=True)
class Table:
    """A table ready to read."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", f"| {' | '.join(self.columns)} |"]
        lines.append("| --- |" + " ---: |" * (len(self.columns) - 1))
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])])

    def csv(self) -> str:
        return _csv([self.columns, *self.rows])


@dataclass(frozen=True)
class Line:
    """A named series with, where there are several seeds, the bounds of its interval."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One set of axes. ``kind``: lines, steps (a histogram), or bars over the categories that ``x`` counts through."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    kind: str = "lines"
    log_x: bool = False
    log_y: bool = False
    categories: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plot:
    """Panels side by side."""

    title: str
    panels: tuple[Panel, ...]
    note: str = ""

    def csv(self) -> str:
        rows: list[Sequence[object]] = [("panel", "series", "x", "y", "low", "high")]
        for panel in self.panels:
            for line in panel.lines:
                bounds = zip(line.low, line.high, strict=True) if line.low else [("", "")] * len(line.x)
                for x, y, (low, high) in zip(line.x, line.y, bounds, strict=True):
                    rows.append((panel.title, line.label, x, y, low, high))
        return _csv(rows)


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def slug(title: str) -> str:
    """A title as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def write_report(name: str, heading: str, parts: Sequence[Table | Plot], notes: Sequence[str], out: Path) -> Path:
    """NAME.md with every table, and a link to every plot; a CSV file each. Returns the page."""
    from e3rl_reproduce.figures import draw

    lines = [f"# {heading}", "", *notes]
    for part in parts:
        stem = f"{name}-{slug(part.title)}"
        write_text(out / f"{stem}.csv", part.csv())
        if isinstance(part, Table):
            lines += ["", part.markdown()]
        else:
            drawn = draw(part, out / stem)
            lines += ["", f"### {part.title}", "", f"![{part.title}]({stem}.png)" if drawn else f"Data: {stem}.csv"]
            lines += ["", part.note] if part.note else []
    write_text(out / f"{name}.md", "\n".join(lines) + "\n")
    return out / f"{name}.md"
