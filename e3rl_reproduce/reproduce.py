"""From a study's name to its report: tune, train, measure, write."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from e3rl.errors import UserError, unknown
from e3rl.files import write_text
from e3rl_reproduce.cells import Cell
from e3rl_reproduce.measures import EXAM, score
from e3rl_reproduce.output import NEEDS, Plot, Table, can_draw, slug, write_report
from e3rl_reproduce.results import Results, study_cells
from e3rl_reproduce.running import Failure, departures, missing_benchmarks, plan, requirements, run_cells
from e3rl_reproduce.studies import find_studies
from e3rl_reproduce.study import Scale, Study, models_of, tuning_cells

Say = Callable[[str], None]
Task = tuple[Study, Scale]


def tasks(
    names: Sequence[str],
    scale: str,
    overrides: Sequence[str] = (),
    *,
    out: Path,
    model: str | None = None,
    overlays: Sequence[str] = (),
) -> list[Task]:
    """The studies behind names, each with its scale; overlays and overrides are laid on every recipe. ``model``: only this.

    What a study prepares is made under ``out``.
    """
    found = []
    for study in (study for name in names for study in find_studies(name)):
        own = study.at(scale)
        known = {name: own.models[name] for name in models_of(study, own)}
        if model is not None and model not in known:
            raise unknown(f"model of {study.name} at scale {scale}", model, known)
        chosen = known if model is None else {model: known[model]}
        prepared = study.prepare(own, out)
        laid = replace(own, overlays=(*own.overlays, *overlays), overrides=(*own.overrides, *prepared, *overrides))
        found.append((study, replace(laid, models=chosen)))
    return found


def _wanted(todo: Sequence[Task], out: Path, *, tuning: bool) -> list[Cell]:
    """The cells of the studies, each study's in turn: the sweeps, or the rows (with what the sweeps have chosen)."""
    cells: list[Cell] = []
    for study, scale in todo:
        for model in models_of(study, scale):
            found = tuning_cells(study, scale, model) if tuning else study_cells(study, scale, model, out)
            cells += found.values()
    return cells


def show_plan(todo: Sequence[Task], out: Path) -> list[str]:
    """What the studies would need."""
    lines: list[str] = []
    for study, scale in todo:
        by_model = {
            model: [*tuning_cells(study, scale, model).values(), *study_cells(study, scale, model, out).values()]
            for model in models_of(study, scale)
        }
        lines += [*plan(study, scale, by_model, out), ""]
    return lines


def _check(todo: Sequence[Task], out: Path) -> None:
    """Refuse what can't run here, with all reasons at once, before anything runs."""
    cells = _wanted(todo, out, tuning=True) + _wanted(todo, out, tuning=False)
    needs = [need for cell in cells for need in requirements(cell.config)]
    needs += [need for _, scale in todo for need in missing_benchmarks(scale)]
    if needs:
        listed = "\n  ".join(dict.fromkeys(needs))
        raise UserError(f"this can't run here; missing are\n  {listed}\n--plan says what it would need in all")


def reproduce(
    todo: Sequence[Task],
    out: Path,
    *,
    jobs: int,
    launcher: Sequence[str] = (),
    deadline: float | None = None,
    say: Say = print,
) -> list[Path]:
    """Run what is missing of the studies, sweeps first, and write their reports; returns the pages."""
    _check(todo, out)
    together = min(scale.together for _, scale in todo)
    failures: list[Failure] = []
    for tuning in (True, False):
        cells = _wanted(todo, out, tuning=tuning)
        if cells:
            failures += run_cells(
                cells, out, jobs=jobs, together=together, launcher=launcher, deadline=deadline, say=say
            )
    if not can_draw():
        say(NEEDS)
    return [report(study, scale, out, failures) for study, scale in todo]


def report(study: Study, scale: Scale, out: Path, failures: Sequence[Failure] = ()) -> Path:
    """Write the study's page and files from existing results; the page names what is missing."""
    parts: list[Table | Plot] = []
    notes: list[str] = []
    environments: list[Mapping[str, str]] = []
    models = models_of(study, scale)
    for model in models:
        results = Results.read(study, scale, model, out)
        notes += _named_missing(results, failures)
        environments += results.environments()
        made = [part for view in study.views for part in view(results)]
        parts += made if len(models) == 1 else [_named(part, model) for part in made]
        name = study.name if len(models) == 1 else f"{study.name}-{slug(model)}"
        write_text(out / f"{name}-values.csv", values_csv(results))
    heading = [_made_with(scale, environments), *(["", study.notes] if study.notes else [])]
    if departed := departures(study, scale):
        heading += ["", "**Not as in the paper:**", "", *(f"- {departure}" for departure in departed)]
    return write_report(study.name, study.title, parts, [*heading, *notes], out)


def _named_missing(results: Results, failures: Sequence[Failure]) -> list[str]:
    absent = results.absent()
    if not absent:
        return []
    reasons = {f.cell.address: f.reason for f in failures}
    why = sorted({reasons[cell.address] for cell in results.cells.values() if cell.address in reasons})
    return ["", f"**Missing ({results.model}):** {'; '.join(absent)}." + (f" Why: {'; '.join(why)}." if why else "")]


def _named(part: Table | Plot, model: str) -> Table | Plot:
    return replace(part, title=f"{model}: {part.title}")


def _made_with(scale: Scale, environments: Sequence[Mapping[str, str]]) -> str:
    """The commits, machines and versions that the measurements were taken with."""

    def distinct(say: Callable[[Mapping[str, str]], str]) -> str:
        return "; ".join(dict.fromkeys(say(facts) for facts in environments)) or "none"

    commits = distinct(lambda facts: facts.get("commit", "unknown"))
    machines = distinct(lambda f: f"{f['cores']} cores of {f['processor']}" + (f", {f['gpu']}" if "gpu" in f else ""))
    versions = distinct(lambda facts: f"torch {facts['torch']}, transformers {facts['transformers']}")
    return (
        f"Scale `{scale.name}`. Measured at commit {commits}; {machines}; {versions}. Seeds "
        f"{', '.join(map(str, scale.seeds))}; ± is a 95 % interval over seeds (Student's t)."
    )


def values_csv(results: Results) -> str:
    """Every exam by row, seed and benchmark, from which the tables are made."""
    rows: list[tuple[object, ...]] = [
        (
            "row",
            "seed",
            "at",
            "decoding",
            "benchmark",
            "step",
            "tokens",
            "samples",
            "avg",
            "pass",
            "finish_ratio",
            "length",
            "r",
        )
    ]
    for (row, seed), cell in results.cells.items():
        for measure in cell.measures:
            found = results.measurement(row, seed, measure) if measure.function == EXAM else None
            if found is None:
                continue
            decoding = "erasable" if measure.options.get("erase") else "plain"
            for name, result in found["values"].items():
                k = result["samples"]
                scores = [f"{score(result, metric, k):.6f}" for metric in ("avg", "pass")]
                rest = [f"{result[key]:.4f}" for key in ("finish_ratio", "length", "r")]
                rows.append((row, seed, measure.at, decoding, name, found["step"], found["tokens"], k, *scores, *rest))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
