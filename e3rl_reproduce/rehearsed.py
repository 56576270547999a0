"""`e3rl reproduce … --rehearse N`: the first cells of the studies, by the process that would run them, at a rehearsal's sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from e3rl.data.benchmarks import BENCHMARKS
from e3rl.errors import UserError
from e3rl.rehearse.rehearsal import LIMIT, Rehearsal, changed, kept, loaded, require_extras, shrink, trained
from e3rl.rehearse.stages import Stages
from e3rl_reproduce.cells import ERROR, Cell, Measure, read_measurement
from e3rl_reproduce.measures import EXAM
from e3rl_reproduce.reproduce import Task
from e3rl_reproduce.results import study_cells
from e3rl_reproduce.running import cell_command, reason
from e3rl_reproduce.study import models_of


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
        found.notes += [f"{name}: {said}" for said in _run(name, small, found.stages)]
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


def _run(name: str, cell: Cell, stages: Stages) -> list[str]:
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
