"""Tables and plots as values, and how they are written: Markdown, CSV, and PNG and SVG where matplotlib is installed."""

from __future__ import annotations

import csv
import importlib.util
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from e3rl.files import atomic_file, write_text


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


NEEDS = "drawing figures needs matplotlib: pip install 'e3rl[reproduce]' (the data are written as CSV without it)"


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(plot: Plot, stem: Path) -> bool:
    """Write ``stem``.png and ``stem``.svg; False where matplotlib is not installed."""
    if not can_draw():
        return False
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "e3rl"  # the same file from the same data
    from matplotlib import pyplot

    columns = min(3, len(plot.panels))
    rows = -(-len(plot.panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns, 3.3 * rows), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes.flat, plot.panels, strict=False):
        _panel(axis, panel)
    for axis in list(axes.flat)[len(plot.panels) :]:
        axis.set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if len(labels) > 1:
        fitting = int(11 * figure.get_figwidth()) // (max(map(len, labels)) + 8)  # letters of a line, those of a column
        ncols = max(1, min(6, len(labels), fitting))
        figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False)
    for suffix in ("png", "svg"):
        with atomic_file(stem.with_name(f"{stem.name}.{suffix}")) as path:
            metadata = {"Date": None} if suffix == "svg" else {}
            figure.savefig(path, format=suffix, dpi=130, metadata=metadata)
    pyplot.close(figure)
    return True


def _panel(axis, panel: Panel) -> None:  # type: ignore[no-untyped-def]
    """Lines with shaded intervals, a histogram, or grouped bars with whiskers."""
    for number, line in enumerate(panel.lines):
        if panel.kind == "lines":
            (drawn,) = axis.plot(
                line.x, line.y, label=line.label, linewidth=1.5, marker="." if len(line.x) < 12 else ""
            )
            if line.low:
                axis.fill_between(line.x, line.low, line.high, alpha=0.15, color=drawn.get_color(), linewidth=0)
        elif panel.kind == "steps":
            axis.fill_between(line.x, line.y, step="mid", label=line.label, alpha=0.7)
        else:
            width = 0.8 / len(panel.lines)
            places = [x + (number - (len(panel.lines) - 1) / 2) * width for x in line.x]
            below = [y - low for y, low in zip(line.y, line.low, strict=True)] if line.low else None
            above = [high - y for y, high in zip(line.y, line.high, strict=True)] if line.low else None
            axis.bar(places, line.y, width, label=line.label, yerr=[below, above] if line.low else None, capsize=2)
    if panel.categories:
        crowded = len(panel.categories) > 8
        turned = {"rotation": 90, "fontsize": 7} if crowded else {"rotation": 30, "ha": "right"}
        axis.set_xticks(range(len(panel.categories)), panel.categories, **turned)
    if panel.log_x:
        axis.set_xscale("log", base=2)
    if panel.log_y:
        axis.set_yscale("log")
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel(panel.x_label, fontsize=9)
    axis.set_ylabel(panel.y_label, fontsize=9)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
