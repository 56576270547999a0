"""Views of accuracy: tables by benchmark, margins over baselines, Pass@k, each beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from e3rl_reproduce.cells import Measure
from e3rl_reproduce.output import Line, Panel, Plot, Table
from e3rl_reproduce.paper import paper_mean, paper_models, paper_row
from e3rl_reproduce.results import Results, SeedMean, difference, estimate
from e3rl_reproduce.study import erasable_exam, pass_exam, plain_exams

_AT = {"steps": "equal steps", "tokens": "equal generated tokens"}
NOTHING = "–"


def text(found: SeedMean | None, digits: int = 3, sign: bool = False) -> str:
    return NOTHING if found is None else found.text(digits, sign)


@dataclass(frozen=True)
class Accuracy:
    """What an accuracy view shows: ``metric`` ('avg', 'pass' or 'boxed') at k, and where the paper has it."""

    metric: str
    paper_table: str
    paper_metric: str

    def k(self, results: Results) -> int:
        return results.scale.samples

    def title(self, results: Results) -> str:
        return f"{self.metric.capitalize()}@{self.k(results)}"


def _exam_rows(results: Results, measure: Measure, show: Accuracy, labels: Sequence[str]) -> list[tuple[str, ...]]:
    k, lines = show.k(results), []
    for label in labels:
        mean_all = estimate(list(results.accuracy(label, measure, show.metric, k).values()))
        by_benchmark = [
            estimate(list(results.accuracy(label, measure, show.metric, k, name).values()))
            for name in results.scale.benchmarks
        ]
        step = results.estimate(label, measure, lambda item: item["step"])
        tokens = results.estimate(label, measure, lambda item: item["tokens"])
        counts = [NOTHING if x is None else f"{x.mean:,.0f}" for x in (step, tokens)]
        seeds = str(mean_all.seeds if mean_all else 0)
        lines.append((label, text(mean_all), *map(text, by_benchmark), *counts, seeds))
    return lines


def accuracy(show: Accuracy) -> Callable[[Results], list[Table | Plot]]:
    """A table for each way to compare: at equal steps, at equal generated tokens."""

    def view(results: Results) -> list[Table | Plot]:
        columns = ("row", "mean", *results.scale.benchmarks, "steps", "tokens", "seeds")
        labels = [row.label for row in results.rows]
        found: list[Table | Plot] = []
        for measure in plain_exams(results.scale):
            title = f"{show.title(results)}, plain decoding, {_AT[measure.at]}"
            found.append(Table(title, columns, tuple(_exam_rows(results, measure, show, labels))))
        erasable = [row.label for row in results.rows if row.erasable]
        if erasable:
            rows = _exam_rows(results, erasable_exam(results.scale), show, erasable)
            title = f"{show.title(results)}, erasable decoding, equal steps"
            found.append(Table(title, columns, tuple(rows), "Reported apart: the paper decodes every method plainly."))
        return found

    return view


def accuracy_bars(show: Accuracy) -> Callable[[Results], list[Table | Plot]]:
    """The methods side by side, benchmark by benchmark, at equal steps."""

    def view(results: Results) -> list[Table | Plot]:
        measure, names, k = plain_exams(results.scale)[0], tuple(results.scale.benchmarks), show.k(results)
        lines = []
        for row in results.rows:
            found = [
                estimate(list(results.accuracy(row.label, measure, show.metric, k, name).values())) for name in names
            ]
            lines.append(banded(row.label, [(i, item) for i, item in enumerate(found) if item]))
        panel = Panel(
            "plain decoding, equal steps", "benchmark", show.title(results), tuple(lines), "bars", categories=names
        )
        return [Plot(f"{show.title(results)} by benchmark", (panel,))]

    return view


def paper_numbers(show: Accuracy) -> Callable[[Results], list[Table | Plot]]:
    """The paper's own table."""

    def view(results: Results) -> list[Table | Plot]:
        found: list[Table | Plot] = []
        for model in paper_models(show.paper_table):
            rows = []
            for row in results.rows:
                values = paper_row(show.paper_table, model, row.in_paper)
                mean = paper_mean(show.paper_table, model, row.in_paper, show.paper_metric)
                cells = [value.get(show.paper_metric) for value in values.values()]
                if values:
                    rows.append((row.in_paper, *(NOTHING if x is None else f"{x:.3f}" for x in (mean, *cells))))
            if rows:
                names = tuple(paper_row(show.paper_table, model, rows[0][0]))
                found.append(Table(f"The paper, {model}, {show.paper_metric}", ("row", "mean", *names), tuple(rows)))
        return found

    return view


def margins(show: Accuracy, ours: str, baselines: Sequence[str], rival: str) -> Callable[[Results], list[Table | Plot]]:
    """How far ``ours`` is ahead of the best baseline and of the paper's choice, in our numbers and the paper's."""

    def line(results: Results, measure: Measure, name: str, kind: str) -> tuple[str, ...]:
        k = show.k(results)
        mine = results.accuracy(ours, measure, show.metric, k)
        theirs = results.accuracy(name, measure, show.metric, k)
        gap = difference(mine, theirs)
        relative = estimate([mine[s] / theirs[s] - 1 for s in mine.keys() & theirs.keys() if theirs[s] > 0])
        percent = NOTHING if relative is None else f"{100 * relative.mean:+.1f} %"
        return (f"ours, {_AT[measure.at]}", kind, name, text(gap, sign=True), percent, str(gap.seeds if gap else 0))

    def best(results: Results, measure: Measure) -> str | None:
        means = {
            name: sum(found.values()) / len(found)
            for name in baselines
            if (found := results.accuracy(name, measure, show.metric, show.k(results)))
        }
        return max(means, key=means.__getitem__) if means else None

    def view(results: Results) -> list[Table | Plot]:
        rows = []
        for measure in plain_exams(results.scale):
            strongest = best(results, measure)
            if strongest:
                rows.append(line(results, measure, strongest, "best baseline"))
                rows.append(line(results, measure, rival, "the paper's choice"))
        rows += _paper_margins(show, ours, baselines, rival)
        columns = ("numbers", "against", "baseline", f"difference in {show.metric}", "relative", "seeds")
        note = "Differences are paired by seed; ± is a 95 % interval over seeds. The best baseline is chosen after the fact."
        return [Table(f"Margin of {ours} in {show.title(results)}", columns, tuple(rows), note)]

    return view


def _paper_margins(show: Accuracy, ours: str, baselines: Sequence[str], rival: str) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for model in paper_models(show.paper_table):
        means = {name: paper_mean(show.paper_table, model, name, show.paper_metric) for name in (ours, *baselines)}
        known = {name: value for name, value in means.items() if value is not None}
        if ours not in known or len(known) < 2:
            continue
        strongest = max((name for name in known if name != ours), key=known.__getitem__)
        for name, kind in ((strongest, "best baseline"), (rival, "the paper's choice")):
            gap, relative = known[ours] - known[name], known[ours] / known[name] - 1
            rows.append((f"paper, {model}", kind, name, f"{gap:+.3f}", f"{100 * relative:+.3f} %", NOTHING))
    return rows


def against_full(show: Accuracy, full: str) -> Callable[[Results], list[Table | Plot]]:
    """What each row of an ablation gains or loses against the full method, beside what the paper says."""

    def view(results: Results) -> list[Table | Plot]:
        measures, k = plain_exams(results.scale), show.k(results)
        models = paper_models(show.paper_table)
        rows = []
        for row in results.rows:
            gaps = [
                difference(
                    results.accuracy(row.label, measure, show.metric, k),
                    results.accuracy(full, measure, show.metric, k),
                )
                for measure in measures
            ]
            told = []
            for model in models:
                mine, whole = (
                    paper_mean(show.paper_table, model, name, show.paper_metric) for name in (row.label, full)
                )
                told.append(NOTHING if mine is None or whole is None else f"{mine - whole:+.3f}")
            rows.append((row.label, *(text(gap, sign=True) for gap in gaps), *told))
        ours = tuple(f"ours, {_AT[measure.at]}" for measure in measures)
        columns = ("row", *ours, *(f"paper, {model}" for model in models))
        note = "Mean over benchmarks, paired by seed; ± is a 95 % interval over seeds."
        return [Table(f"Difference from {full} in {show.title(results)}", columns, tuple(rows), note)]

    return view


def pass_curves(paper_table: str) -> Callable[[Results], list[Table | Plot]]:
    """Pass@k against k, as a table and as curves."""

    def at_k(results: Results, label: str, k: int, name: str | None = None) -> SeedMean | None:
        return estimate(list(results.accuracy(label, pass_exam(results.scale), "pass", k, name).values()))

    def panel(results: Results, name: str | None) -> Panel:
        lines = []
        for row in results.rows:
            points = [(k, found) for k in results.scale.pass_ks if (found := at_k(results, row.label, k, name))]
            lines.append(banded(row.label, points))
        return Panel(name or "mean", "k", "Pass@k", tuple(lines), log_x=True)

    def view(results: Results) -> list[Table | Plot]:
        ks = results.scale.pass_ks
        rows = [(row.label, *(text(at_k(results, row.label, k)) for k in ks)) for row in results.rows]
        found: list[Table | Plot] = [
            Table("Pass@k, mean over benchmarks", ("row", *(f"k = {k}" for k in ks)), tuple(rows))
        ]
        for model in paper_models(paper_table):
            told = []
            for row in results.rows:
                first = paper_row(paper_table, model, row.label)
                keys = list(next(iter(first.values()), {}))
                means = [paper_mean(paper_table, model, row.label, key) for key in keys]
                if keys:
                    told.append((keys, (row.label, *(NOTHING if x is None else f"{x:.3f}" for x in means))))
            if told:
                columns = ("row", *(key.replace("pass@", "k = ") for key in told[0][0]))
                found.append(Table(f"The paper, {model}, Pass@k", columns, tuple(line for _, line in told)))
        panels = (panel(results, None), *(panel(results, name) for name in results.scale.benchmarks))
        return [*found, Plot("Pass@k curves", panels)]

    return view


def banded(label: str, points: Sequence[tuple[float, SeedMean]]) -> Line:
    """A line with its 95 % band. Fewer than three seeds have none: Student's interval of two is wider than any axis."""
    y = tuple(found.mean for _, found in points)
    widths = [found.half_width for _, found in points]
    x = tuple(place for place, _ in points)
    if any(found.seeds < 3 for _, found in points):
        return Line(label, x, y)
    low, high = (tuple(a + sign * w for a, w in zip(y, widths, strict=True)) for sign in (-1, 1))
    return Line(label, x, y, low, high)
