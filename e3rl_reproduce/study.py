"""A study: rows that are trained and measured, and views of what came out. Declarative; nothing here runs anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from e3rl.config import Config, load_config
from e3rl_reproduce.cells import Cell, Measure
from e3rl_reproduce.exam import NAME as EXAM
from e3rl_reproduce.scales import RECIPES, SCALES, Scale

if TYPE_CHECKING:
    from e3rl_reproduce.output import Plot, Table
    from e3rl_reproduce.results import Results

View = Callable[["Results"], "Sequence[Table | Plot]"]


@dataclass(frozen=True)
class Row:
    """A line of a table: overlays and overrides on the scale's recipe.

    ``tuned_as``: the row whose learning-rate sweep decides this row's; empty: its own. ``erasable``: also examined with
    erasable decoding, at its own settings. ``whole``: a response is one segment, as long as the recipe lets it
    become. ``measures`` are taken beside the study's. ``paper``: the row's name in the paper, where that is another one.
    """

    label: str
    overlays: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    tuned_as: str = ""
    erasable: bool = False
    whole: bool = False
    measures: tuple[Measure, ...] = ()
    paper: str = ""

    @property
    def in_paper(self) -> str:
        return self.paper or self.label

    @property
    def tuned_by(self) -> str:
        return self.tuned_as or self.label


@dataclass(frozen=True)
class Study:
    """What `e3rl reproduce NAME` does.

    ``rows`` and ``measures`` depend on the scale; ``models`` are those that the paper's version uses (at other scales the
    scale's own model stands for all of them). ``methods`` holds every row that some ``tuned_as`` names. ``scales`` stand
    in for the scales of the same name.
    """

    name: str
    title: str
    rows: Callable[[Scale], Sequence[Row]]
    measures: Callable[[Scale], Sequence[Measure]]
    views: tuple[View, ...]
    models: tuple[str, ...]
    methods: Mapping[str, Row] = field(default_factory=dict)
    scales: Mapping[str, Scale] = field(default_factory=dict)
    notes: str = ""

    def at(self, name: str) -> Scale:
        """The study's own version of a scale, where it has one, else everybody's."""
        return self.scales.get(name, SCALES[name])


def models_of(study: Study, scale: Scale) -> list[str]:
    """The study's models where the scale has them, else the scale's own."""
    return [m for m in study.models if m in scale.models] or list(scale.models)


def plain_exams(scale: Scale) -> tuple[Measure, ...]:
    """Plain decoding after all steps, and at the token budget where the scale has one."""
    at_end = Measure(EXAM, "steps", exam_options(scale))
    return (at_end, replace(at_end, at="tokens")) if scale.token_budget else (at_end,)


def exam_options(scale: Scale) -> dict[str, object]:
    return {"benchmarks": dict(scale.benchmarks), "problems": scale.problems, "samples": scale.samples}


def erasable_exam(scale: Scale) -> Measure:
    return Measure(EXAM, "steps", {**exam_options(scale), "erase": True})


def pass_exam(scale: Scale) -> Measure:
    """As many samples as the largest k of the Pass@k curves asks for."""
    return Measure(EXAM, "steps", {**exam_options(scale), "samples": scale.pass_samples})


def validation_exam(scale: Scale) -> Measure:
    """What learning rates are chosen by: problems of the training half, never those that are reported."""
    options = {"benchmarks": dict(scale.validation), "problems": scale.problems, "samples": scale.samples}
    return Measure(EXAM, "steps", {**options, "split": "train"})


def row_config(scale: Scale, model: str, row: Row, *, seed: int, learning_rate: float | None) -> Config:
    """The recipe of the model, the row's overlays, then the overrides of scale and row."""
    overlays = [RECIPES / f"{name}.toml" for name in row.overlays]
    rate = [] if learning_rate is None else [f"train.learning_rate={learning_rate!r}"]
    settings = [*scale.overrides, *row.overrides, *rate, f"run.seed={seed}"]
    config = load_config(scale.recipe(model), overlays, settings)
    if not row.whole:
        return config
    one = replace(config.rollout, segment_length=config.rollout.completion_limit, max_segments=1)
    return replace(config, rollout=one)


def row_cell(study: Study, scale: Scale, model: str, row: Row, *, seed: int, learning_rate: float | None) -> Cell:
    """One row with one seed, and all that the study measures of it."""
    config = row_config(scale, model, row, seed=seed, learning_rate=learning_rate)
    measures = (*study.measures(scale), *((erasable_exam(scale),) if row.erasable else ()), *row.measures)
    return Cell(config, measures, scale.token_budget)


def tuning_cells(study: Study, scale: Scale, model: str) -> dict[tuple[str, float], Cell]:
    """The sweep: every row that others are tuned as, with every learning rate, under a seed of its own."""
    rows = {row.tuned_by: study.methods.get(row.tuned_by, row) for row in study.rows(scale)}
    shorter = replace(scale, overrides=(*scale.overrides, *scale.tuning_overrides))
    measures, seed = (validation_exam(scale),), scale.tuning_seed
    return {
        (name, rate): Cell(row_config(shorter, model, row, seed=seed, learning_rate=rate), measures)
        for name, row in rows.items()
        if row.overlays != ("methods/vanilla",)
        for rate in scale.learning_rates
    }
