"""Results of a study's cells, read from disk, with means and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy import stats

from e3rl.train.run_directory import read_lines
from e3rl_reproduce.cells import Cell, Measure, missing, read_measurement
from e3rl_reproduce.measures import score
from e3rl_reproduce.study import Row, Scale, Study, row_cell, tuning_cells


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds and the half width of its 95 % interval (NaN with one seed)."""

    mean: float
    half_width: float
    seeds: int

    def text(self, digits: int = 3, sign: bool = False) -> str:
        """For tables; the interval is left out for one seed."""
        form = f"{'+' if sign else ''}.{digits}f"
        spread = "" if math.isnan(self.half_width) else f" ± {self.half_width:.{digits}f}"
        return f"{self.mean:{form}}{spread}"


def estimate(values: Sequence[float]) -> SeedMean | None:
    """Student's t interval; None without values."""
    if not values:
        return None
    if len(values) == 1:
        return SeedMean(values[0], math.nan, 1)
    half_width = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return SeedMean(fmean(values), float(half_width), len(values))


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> SeedMean | None:
    """Mean of the differences by seed, over the seeds that both have."""
    return estimate([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def tuning_score(cell: Cell, out: Path) -> float | None:
    """Mean accuracy over the validation problems; None where the cell has not run."""
    found = read_measurement(cell, cell.measures[0], out)
    if found is None:
        return None
    values = [score(result, "avg", 1) for result in found["values"].values()]
    return sum(values) / len(values)


def chosen_rates(study: Study, scale: Scale, model: str, out: Path) -> dict[str, float | None]:
    """The learning rate of every row: the best of its sweep, the smaller on a tie; None: not swept, the recipe's own."""
    scores: dict[str, list[tuple[float, float]]] = {}
    for (name, rate), cell in tuning_cells(study, scale, model).items():
        found = tuning_score(cell, out)
        if found is not None:
            scores.setdefault(name, []).append((found, -rate))
    return {row.label: -max(scores[row.tuned_by])[1] if row.tuned_by in scores else None for row in study.rows(scale)}


def study_cells(study: Study, scale: Scale, model: str, out: Path) -> dict[tuple[str, int], Cell]:
    """A cell for every row and seed, seeds outermost: an interrupted study has whole seeds first."""
    rates = chosen_rates(study, scale, model, out)
    return {
        (row.label, seed): row_cell(study, scale, model, row, seed=seed, learning_rate=rates[row.label])
        for place, seed in enumerate(scale.seeds)
        for row in study.rows(scale)
        if not row.seeds or place < row.seeds
    }


@dataclass(frozen=True)
class Results:
    """One model's cells of a study, by row and seed, and what was measured of them."""

    study: Study
    scale: Scale
    model: str
    out: Path
    cells: Mapping[tuple[str, int], Cell]
    rates: Mapping[str, float | None]

    @classmethod
    def read(cls, study: Study, scale: Scale, model: str, out: Path) -> Results:
        rates = chosen_rates(study, scale, model, out)
        return cls(study, scale, model, out, study_cells(study, scale, model, out), rates)

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(self.study.rows(self.scale))

    def measurement(self, row: str, seed: int, measure: Measure) -> dict[str, Any] | None:
        """None where it was not taken, or the row does without the seed. KeyError for a row that the study does not have."""
        if (row, self.scale.seeds[0]) not in self.cells:
            raise KeyError(f"study '{self.study.name}' has no row '{row}'")
        cell = self.cells.get((row, seed))
        return None if cell is None else read_measurement(cell, measure, self.out)

    def by_seed(self, row: str, measure: Measure, value: Callable[[dict[str, Any]], float]) -> dict[int, float]:
        """``value`` of each seed's measurement, over the seeds that there are."""
        found = {seed: self.measurement(row, seed, measure) for seed in self.scale.seeds}
        return {seed: value(item) for seed, item in found.items() if item is not None}

    def accuracy(
        self, row: str, measure: Measure, metric: str, k: int, benchmark: str | None = None
    ) -> dict[int, float]:
        """Avg@k or Pass@k by seed: of one benchmark, or the mean over all."""

        def value(item: dict[str, Any]) -> float:
            names = [benchmark] if benchmark else list(item["values"])
            return sum(score(item["values"][name], metric, k) for name in names) / len(names)

        return self.by_seed(row, measure, value)

    def estimate(self, row: str, measure: Measure, value: Callable[[dict[str, Any]], float]) -> SeedMean | None:
        return estimate(list(self.by_seed(row, measure, value).values()))

    def training(self, row: str, seed: int) -> list[dict[str, Any]]:
        """The lines of the run's metrics.jsonl; none where it was not trained."""
        return read_lines(self.cells[row, seed].directory(self.out) / "run" / "metrics.jsonl")

    def environments(self) -> list[dict[str, str]]:
        """What each measurement was taken with."""
        found = [self.measurement(row, seed, m) for (row, seed), cell in self.cells.items() for m in cell.measures]
        return [item["environment"] for item in found if item is not None]

    def absent(self) -> list[str]:
        """The rows and seeds of which something is not measured, in words, a row at a time."""
        seeds: dict[str, list[str]] = {}
        for (row, seed), cell in self.cells.items():
            if missing(cell, self.out):
                seeds.setdefault(row, []).append(str(seed))
        return [f"{row}, seed{'s' * (len(found) > 1)} {', '.join(found)}" for row, found in seeds.items()]
