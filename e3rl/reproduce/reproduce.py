"""From a study's name to its report: tune, train, measure, write."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from e3rl.errors import UserError
from e3rl.files import write_text
from e3rl.reproduce.cells import Cell
from e3rl.reproduce.exam import NAME as EXAM
from e3rl.reproduce.exam import score
from e3rl.reproduce.figures import NEEDS, can_draw
from e3rl.reproduce.output import Plot, Table, write_report
from e3rl.reproduce.plan import plan, requirements
from e3rl.reproduce.results import Results, study_cells
from e3rl.reproduce.runner import Failure, run_cells
from e3rl.reproduce.scales import Scale
from e3rl.reproduce.study import Study, models_of, tuning_cells
from e3rl.train.environment import environment

Say = Callable[[str], None]


def _wanted(studies: Sequence[Study], scale: Scale, out: Path, tuning: bool) -> list[Cell]:
    """The cells of the studies, each study's in turn: the sweeps, or the rows (with what the sweeps have chosen)."""
    cells: list[Cell] = []
    for study in studies:
        for model in models_of(study, scale):
            found = tuning_cells(study, scale, model) if tuning else study_cells(study, scale, model, out)
            cells += found.values()
    return cells


def show_plan(studies: Sequence[Study], scale: Scale, out: Path) -> list[str]:
    """What the studies would need."""
    lines: list[str] = []
    for study in studies:
        by_model = {
            model: [*tuning_cells(study, scale, model).values(), *study_cells(study, scale, model, out).values()]
            for model in models_of(study, scale)
        }
        lines += [*plan(study, scale, by_model, out), ""]
    return lines


def _check(cells: Sequence[Cell]) -> None:
    """Refuse what can't run here, all reasons at once, before anything is spent."""
    needs = list(dict.fromkeys(need for cell in cells for need in requirements(cell.config)))
    if needs:
        listed = "\n  ".join(needs)
        raise UserError(f"this can't run here; missing are\n  {listed}\n--plan says what it would need in all")


def reproduce(
    studies: Sequence[Study],
    scale: Scale,
    out: Path,
    *,
    jobs: int,
    launcher: Sequence[str] = (),
    deadline: float | None = None,
    say: Say = print,
) -> list[Path]:
    """Run what is missing of the studies, sweeps first, and write their reports; returns the pages."""
    sweep = _wanted(studies, scale, out, tuning=True)
    _check(sweep + _wanted(studies, scale, out, tuning=False))
    options = {"jobs": jobs, "together": scale.together, "launcher": launcher, "deadline": deadline, "say": say}
    failures = run_cells(sweep, out, **options) if sweep else []  # type: ignore[arg-type]
    failures += run_cells(_wanted(studies, scale, out, tuning=False), out, **options)  # type: ignore[arg-type]
    if not can_draw():
        say(NEEDS)
    return [report(study, scale, out, failures) for study in studies]


def report(study: Study, scale: Scale, out: Path, failures: Sequence[Failure] = ()) -> Path:
    """The study's page and files from what is there; what is missing is named in it."""
    parts: list[Table | Plot] = []
    notes = [_made_with(scale)]
    models = models_of(study, scale)
    for model in models:
        results = Results.read(study, scale, model, out)
        absent = results.absent()
        if absent:
            reasons = {f.cell.address: f.reason for f in failures}
            why = sorted({reasons[c.address] for c in results.cells.values() if c.address in reasons})
            notes += [
                "",
                f"**Missing ({model}):** {'; '.join(absent)}." + (f" Reasons: {'; '.join(why)}." if why else ""),
            ]
        made = [part for view in study.views for part in view(results)]
        parts += made if len(models) == 1 else [_named(part, model) for part in made]
        write_text(
            out / f"{study.name}-values{'' if len(models) == 1 else '-' + model.lower()}.csv", values_csv(results)
        )
    if study.notes:
        notes += ["", study.notes]
    return write_report(study.name, study.title, parts, notes, out)


def _named(part: Table | Plot, model: str) -> Table | Plot:
    return replace(part, title=f"{model}: {part.title}")


def _made_with(scale: Scale) -> str:
    facts = environment()
    machine = f"{facts['cores']} cores of {facts['processor']}" + (f", {facts['gpu']}" if "gpu" in facts else "")
    versions = f"torch {facts['torch']}, transformers {facts['transformers']}"
    return (
        f"Scale `{scale.name}`, commit {facts.get('commit', 'unknown')}, {machine}, {versions}. "
        f"Seeds {', '.join(map(str, scale.seeds))}; ± is a 95 % interval over seeds (Student's t)."
    )


def values_csv(results: Results) -> str:
    """Every exam by row, seed and benchmark: what the tables are made of."""
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
