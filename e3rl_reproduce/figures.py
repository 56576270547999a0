"""Plots as PNG and SVG. Matplotlib draws them where it is installed; the data are written in any case."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from e3rl.files import atomic_file
from e3rl_reproduce.output import Panel, Plot

NEEDS = "drawing figures needs matplotlib: pip install 'e3rl[figures]' (the data are written as CSV without it)"


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
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
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
