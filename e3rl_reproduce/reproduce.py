"""From a study's name to its report: tune, train, measure, write. And the first cells in rehearsal, by the process that would run
them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from e3rl.data.benchmarks import BENCHMARKS
from e3rl.errors import UserError, unknown
from e3rl.files import write_text
from e3rl.rehearse.rehearsal import LIMIT, Rehearsal, changed, kept, loaded, require_extras, shrink, trained
from e3rl.rehearse.stages import Stages
from e3rl_reproduce.cells import ERROR, Cell, Measure, read_measurement
from e3rl_reproduce.measures import EXAM, score
from e3rl_reproduce.output import NEEDS, Plot, Table, can_draw, slug, write_report
from e3rl_reproduce.results import Results, study_cells
from e3rl_reproduce.running import (
    Failure,
    cell_command,
    departures,
    missing_benchmarks,
    plan,
    reason,
    requirements,
    run_cells,
)
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


# --- `e3rl reproduce … --rehearse N`: the first cells at a rehearsal's sizes


def first_cells(todo: Sequence[Task], count: int, out: Path) -> dict[str, Cell]:
    """The first cells of the studies by model and row, in running order; a shared one only once."""
    found: dict[str, Cell] = {}
    for study, scale in todo:
        for model in models_of(study, scale):
            for (row, _), cell in study_cells(study, scale, model, out).items():
                if cell.address not in {known.address for known in found.values()}:
                    found[f"{model}, {row}"] = cell
    return dict(list(found.items())[:count])


def rehearse_cells(todo: Sequence[Task], count: int, directory: Path, say: Callable[[str], None]) -> Rehearsal:
    """Train (killed once, then resumed), examine and load ``count`` cells. UserError if one fails."""
    cells = first_cells(todo, count, directory)
    for cell in cells.values():
        require_extras(cell.config)
        _require_known(cell)
    found = Rehearsal({}, {}, {}, Stages(directory, say))
    for number, (name, cell) in enumerate(cells.items(), 1):
        place = directory / f"stand-ins-{number}"
        config, sizes, notes = shrink(cell.config, place)
        small = replace(cell, config=config, measures=tuple(map(_shrunk, cell.measures)))
        found.model = sizes
        found.changed = {**found.changed, **changed(cell.config, config)}
        found.kept = {**found.kept, **kept(cell.config, config)}
        found.notes += [note for note in notes if note not in found.notes]
        found.notes += [f"{name}: {said}" for said in _rehearse_cell(name, small, found.stages)]
    return found


def _require_known(cell: Cell) -> None:
    """UserError if a cell is examined on data that no stand-in can replace."""
    named = {source for m in cell.measures for source in m.options.get("benchmarks", {}).values()}
    if strange := sorted(s for s in named if s not in BENCHMARKS and not s.startswith("lab:")):
        raise UserError(f"--rehearse: {', '.join(strange)} is no benchmark that a rehearsal can stand in for")


def _shrunk(measure: Measure) -> Measure:
    """One problem of each benchmark, with the study's number of samples."""
    few = {name: LIMIT for name in ("problems", "tuning") if name in measure.options}
    return replace(measure, options={**measure.options, **few})


def _rehearse_cell(name: str, cell: Cell, stages: Stages) -> list[str]:
    """Run a cell to its end; returns notes on the result."""
    out, place = stages.directory, cell.directory(stages.directory)
    command = cell_command([cell], out)
    notes: list[str] = []
    if cell.trained:
        stages.run_until_saved(f"{name}: train", command, place / "run")
    try:
        stages.run(f"{name}: {'go on, ' if cell.trained else ''}examine", command)
    except UserError as error:
        raise UserError(f"{error}\n{reason(place / ERROR)}".strip()) from None
    if cell.trained:
        notes += trained(cell.config, place / "run") + loaded(stages, place / "run" / "model")
    return notes + [_examined(cell, measure, out) for measure in cell.measures]


def _examined(cell: Cell, measure: Measure, out: Path) -> str:
    """A note on what was measured. UserError if a benchmark is missing, or has fewer samples than the study asks for."""
    found = read_measurement(cell, measure, out)
    assert found is not None
    if measure.function != EXAM:
        return f"measured {measure.function.rpartition(':')[2]}"
    wanted, k = measure.options["benchmarks"], measure.options["samples"]
    short = [b for b in wanted if found["values"].get(b, {}).get("samples") != k]
    if short:
        raise UserError(f"rehearsal: {', '.join(short)} not examined at k = {k}")
    return f"examined on {', '.join(wanted)}, k = {k}"
