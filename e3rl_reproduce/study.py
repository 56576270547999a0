"""What a reproduction is made of: scales (how large), rows and studies. Declarative; nothing here runs anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from e3rl.cli.recipes import find_recipe, find_recipes
from e3rl.config import Config, load_config, parse_override, read_tables
from e3rl_reproduce.cells import Cell, Measure
from e3rl_reproduce.measures import EXAM
from e3rl_reproduce.output import Plot, Table


@dataclass(frozen=True)
class Scale:
    """What a study's rows are laid on, and how they are examined.

    ``models``: the name that the paper gives a model, to the recipe that trains it. ``segments``: the N×L of table 5.
    ``learning_rates``: the sweep that every method goes through; empty: the recipe's own.
    ``tuning_overrides`` make the sweep cheaper than the training it decides on.
    ``token_budget``: generated tokens at which methods are compared, besides after equal steps; 0: only equal steps.
    ``together``: cells that one process runs. ``overlays`` are laid on every recipe before a row's own.
    """

    name: str
    models: Mapping[str, str]
    benchmarks: Mapping[str, str]
    problems: int
    samples: int
    pass_samples: int
    pass_ks: tuple[int, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    segments: tuple[tuple[int, int], ...]
    token_budget: int = 0
    overlays: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    validation: Mapping[str, str] = field(default_factory=dict)
    tuning_seed: int = 1000
    tuning_overrides: tuple[str, ...] = ()
    together: int = 1

    def recipe(self, model: str) -> Path:
        return find_recipe(self.models[model])


_LAB_BENCHMARKS = {f"chain {n}": f"lab:chain:{n}" for n in (1, 2, 3, 4)} | {
    f"path {n}": f"lab:path:{n}" for n in (1, 2, 3)
}
_LAB_TRAINED = {
    f"{family} {n}": f"lab:{family}:{n}" for family, n in (("chain", 3), ("chain", 4), ("path", 2), ("path", 3))
}

SMOKE = Scale(
    name="smoke",
    models={"lab model": "lab"},
    benchmarks={"chain 1": "lab:chain:1", "path 1": "lab:path:1"},
    problems=4,
    samples=4,
    pass_samples=8,
    pass_ks=(1, 2, 4, 8),
    seeds=(0, 1),
    learning_rates=(),
    segments=((16, 4), (8, 8), (4, 16)),
    token_budget=400,
    overrides=(
        "data.train=lab:chain:1",
        "data.train_limit=8",
        "rollout.num_generations=4",
        "train.steps=2",
        "train.prompts_per_step=2",
        "filter.max_refills=2",
        "eval.limit=2",
        "eval.num_samples=2",
    ),
    validation={"chain 1": "lab:chain:1"},
    together=1000,
)

LAB = Scale(
    name="lab",
    models={"lab model": "lab"},
    benchmarks=_LAB_BENCHMARKS,
    problems=24,
    samples=8,
    pass_samples=64,
    pass_ks=(1, 2, 4, 8, 16, 32, 64),
    seeds=(0, 1, 2),
    learning_rates=(1.875e-5, 3.75e-5, 7.5e-5, 1.5e-4),
    tuning_overrides=("train.steps=12",),
    segments=((32, 2), (16, 4), (8, 8), (4, 16), (2, 32)),
    token_budget=40_000,
    overrides=("eval.limit=8", "eval.num_samples=2"),  # the run's own evaluation: exams replace it
    validation=_LAB_TRAINED,
    together=2,
)

SMOLLM2 = Scale(
    name="smollm2",
    models={"SmolLM2-135M": "smollm2-arithmetic"},
    benchmarks={f"arith {n}": f"lab:arith:{n}" for n in (1, 2, 3)},
    problems=24,
    samples=8,
    pass_samples=32,
    pass_ks=(1, 2, 4, 8, 16, 32),
    seeds=(0,),
    learning_rates=(),
    segments=((8, 4), (4, 8), (2, 16)),
    overrides=("eval.limit=6", "eval.num_samples=2"),
)

PAPER = Scale(
    name="paper",
    models={
        "Qwen3-4B": "qwen3-4b",
        "Qwen3-8B": "qwen3-8b",
        "Qwen2.5-1.5B": "erpo-qwen2.5-1.5b",
        "Qwen2.5-3B": "erpo-qwen2.5-3b",
        "Qwen2.5-7B": "erpo-qwen2.5-7b",
    },
    benchmarks={
        "AMC 2023": "amc23",
        "AIME 2024": "aime24",
        "AIME 2025": "aime25",
        "AIME 2026": "aime26",
        "MATH 500": "math500",
        "Minerva": "minerva",
        "OlympiadBench": "olympiadbench",
    },
    problems=0,
    samples=32,
    pass_samples=256,
    pass_ks=(1, 8, 16, 32, 64, 128, 256),
    seeds=(0,),
    learning_rates=(),
    segments=((32, 256), (16, 512), (8, 1024), (4, 2048), (2, 4096)),
)

ERPO_PAPER = replace(
    PAPER,
    benchmarks={name: PAPER.benchmarks[name] for name in ("AMC 2023", "Minerva", "AIME 2024", "AIME 2025")},
    samples=16,
    pass_samples=16,
    pass_ks=(2, 4, 8, 16),
)
"""What the ERPO paper reports on."""

SCALES = {scale.name: scale for scale in (SMOKE, LAB, SMOLLM2, PAPER)}


View = Callable[..., Sequence[Table | Plot]]
"""What is shown of a study's `Results`."""


@dataclass(frozen=True)
class Row:
    """A line of a table: overlays and overrides on the scale's recipe.

    ``tuned_as``: the row whose learning-rate sweep decides this row's; empty: its own. ``erasable``: also examined with
    erasable decoding, at its own settings. ``segments``: segments of a response, at the recipe's total length; 0: the
    recipe's. ``measures`` are added to the study's. ``paper``: the row's name in the paper, if it is another one.
    ``rollouts``: what makes its groups (`Cell`). ``seeds``: how many of the scale's it has; 0: all.
    """

    label: str
    overlays: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    tuned_as: str = ""
    erasable: bool = False
    segments: int = 0
    measures: tuple[Measure, ...] = ()
    paper: str = ""
    rollouts: str = ""
    seeds: int = 0

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
    scale's own model stands for all of them). ``methods`` holds every row that some ``tuned_as`` names. ``scales`` replace
    the scales of the same name. ``prepare`` makes the files that the study needs in the output directory, and returns overrides
    that name them.
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
    prepare: Callable[[Scale, Path], Sequence[str]] = lambda scale, out: ()

    def at(self, name: str) -> Scale:
        """The study's own version of a scale, or else the general one."""
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
    rate = [] if learning_rate is None else [f"train.learning_rate={learning_rate!r}"]
    settings = [*scale.overrides, *row.overrides, *rate, f"run.seed={seed}"]
    config = load_config(scale.recipe(model), find_recipes([*scale.overlays, *row.overlays]), settings)
    if not row.segments:
        return config
    length = config.rollout.completion_limit // row.segments
    return replace(config, rollout=replace(config.rollout, segment_length=length, max_segments=row.segments))


def varied(row: Row) -> set[str]:
    """The settings, as section.field, that a row varies: its overrides, its ablations', its segments."""
    ablations = [name for name in row.overlays if name.startswith("ablations/")]
    tables = [*map(read_tables, find_recipes(ablations)), *map(parse_override, row.overrides)]
    names = {f"{section}.{field}" for table in tables for section, fields in table.items() for field in fields}
    return names | ({"rollout.segment_length", "rollout.max_segments"} if row.segments else set())


def row_cell(study: Study, scale: Scale, model: str, row: Row, *, seed: int, learning_rate: float | None) -> Cell:
    """One row with one seed, and all that the study measures of it."""
    config = row_config(scale, model, row, seed=seed, learning_rate=learning_rate)
    measures = (*study.measures(scale), *((erasable_exam(scale),) if row.erasable else ()), *row.measures)
    return Cell(config, measures, scale.token_budget, row.rollouts)


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
