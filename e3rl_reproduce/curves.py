"""Views of training: what the logs say, step by step, averaged over seeds with a band."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from e3rl_reproduce.output import Line, Panel, Plot, Table
from e3rl_reproduce.results import Results, estimate, tuning_score
from e3rl_reproduce.study import tuning_cells
from e3rl_reproduce.views import banded, text


def _curve(results: Results, label: str, key: str) -> Line:
    """A logged value by step, over the seeds that reached the step."""
    by_step: dict[int, list[float]] = {}
    for seed in results.scale.seeds:
        for line in results.training(label, seed):
            if line.get(key) is not None:
                by_step.setdefault(line["step"], []).append(line[key])
    most = max(map(len, by_step.values()), default=0)
    points = [(step, found) for step, values in by_step.items() if len(values) == most and (found := estimate(values))]
    return banded(label, points)


def training_curves(title: str, keys: Mapping[str, str], note: str = "") -> Callable[[Results], list[Table | Plot]]:
    """A panel for each logged key (key to axis label), a line for each trained row."""

    def view(results: Results) -> list[Table | Plot]:
        panels = []
        for key, label in keys.items():
            lines = [line for row in results.rows if (line := _curve(results, row.label, key)).x]
            panels.append(Panel(label, "step", label, tuple(lines)))
        return [Plot(title, tuple(panels), note)]

    return view


def segment_curves(key: str, label: str) -> Callable[[Results], list[Table | Plot]]:
    """A value that is logged by segment index, over training: a panel a row, a line a segment."""

    def line(results: Results, row: str, index: int) -> Line:
        by_step: dict[int, list[float]] = {}
        for seed in results.scale.seeds:
            for record in results.training(row, seed):
                series = record.get(key) or []
                if index < len(series) and series[index] is not None:
                    by_step.setdefault(record["step"], []).append(series[index])
        points = [(step, found) for step, values in by_step.items() if (found := estimate(values))]
        x, y = tuple(float(step) for step, _ in points), tuple(found.mean for _, found in points)
        return Line(f"segment {index + 1}", x, y)

    def view(results: Results) -> list[Table | Plot]:
        panels = []
        for row in results.rows:
            count = max(
                (len(r.get(key) or []) for s in results.scale.seeds for r in results.training(row.label, s)), default=0
            )
            lines = tuple(line(results, row.label, index) for index in range(count))
            if lines:
                panels.append(Panel(row.label, "step", label, lines))
        return [Plot(f"{label} by segment over training", tuple(panels))] if panels else []

    return view


def training_table(keys: Mapping[str, str], last: int = 5) -> Callable[[Results], list[Table | Plot]]:
    """Means of logged values over the last steps of training, a row a method."""

    def final(results: Results, row: str, key: str) -> str:
        means = []
        for seed in results.scale.seeds:
            values = [r[key] for r in results.training(row, seed)[-last:] if r.get(key) is not None]
            means += [sum(values) / len(values)] if values else []
        return text(estimate(means))

    def view(results: Results) -> list[Table | Plot]:
        rows = [(row.label, *(final(results, row.label, key) for key in keys)) for row in results.rows]
        return [Table(f"Training, mean of the last {last} steps", ("row", *keys.values()), tuple(rows))]

    return view


def rates_table(results: Results) -> list[Table | Plot]:
    """The learning rates, and the sweep that chose them."""
    cells = tuning_cells(results.study, results.scale, results.model)
    if not cells:
        return []
    names = list(dict.fromkeys(name for name, _ in cells))
    rates: Sequence[float] = results.scale.learning_rates
    rows = []
    for name in names:
        scores = [tuning_score(cells[name, rate], results.out) for rate in rates]
        chosen = next((results.rates[row.label] for row in results.rows if row.tuned_by == name), None)
        shown = ("–" if score is None else f"{score:.3f}" for score in scores)
        rows.append((name, *shown, "–" if chosen is None else f"{chosen:g}"))
    columns = ("method", *(f"{rate:g}" for rate in rates), "chosen")
    note = (
        "Mean accuracy after training on problems of the training half, one seed that is not among the reported ones."
    )
    return [Table("Learning rates", columns, tuple(rows), note)]
