"""The papers' tables and figures, each as rows and views. `STUDIES` is the table that `e3rl reproduce` looks names up in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from e3rl.errors import unknown
from e3rl_reproduce.cells import Measure
from e3rl_reproduce.curves import rates_table, segment_curves, training_curves, training_table
from e3rl_reproduce.perturb import conciseness, entropy_histogram, perturbation_measures, perturbation_table
from e3rl_reproduce.settle import CONFIRM, SETTLE
from e3rl_reproduce.study import ERPO_PAPER, Row, Scale, Study, View, pass_exam, plain_exams
from e3rl_reproduce.views import Accuracy, accuracy, accuracy_bars, against_full, margins, paper_numbers, pass_curves
from e3rl_reproduce.when import WHEN

_BASELINES = ("Vanilla", "GRPO", "DAPO", "GSPO", "SAPO")
E3RL = Row("E3RL", ("methods/e3rl",), erasable=True)
METHODS = {
    **{name: Row(name, (f"methods/{name.lower()}",)) for name in (*_BASELINES, "ERPO", "SFT")},
    "E3RL": E3RL,
}

_BASE = Row("Base", ("methods/vanilla",))
"""Vanilla, as the ERPO paper calls it."""

_TABLE1 = tuple(METHODS[name] for name in (*_BASELINES, "ERPO", "E3RL"))


def _ablation(label: str, overlay: str) -> Row:
    return Row(label, ("methods/e3rl", f"ablations/{overlay}"), tuned_as="E3RL")


_TABLE2 = (
    E3RL,
    _ablation("w/o extremum deviation", "without-extremum"),
    _ablation("w/o gradient anomaly", "without-gradient"),
    _ablation("w/o base uncertainty", "without-base"),
    _ablation("ow base uncertainty", "only-base"),
    _ablation("ow gradient anomaly", "only-gradient"),
    _ablation("ow extremum deviation", "only-extremum"),
)
_TABLE3 = (
    E3RL,
    _ablation("w/o frequency penalty", "without-penalty"),
    _ablation("w/o causal allocation", "without-causal"),
    _ablation("w/o group dynamics", "without-group"),
    _ablation("ow group dynamics", "only-group"),
    _ablation("ow causal allocation", "only-causal"),
    _ablation("ow frequency penalty", "only-penalty"),
)


def _table4(scale: Scale) -> tuple[Row, ...]:
    return tuple(
        Row(f"erase@{n}", ("methods/e3rl",), (f"erasure.max_erasures={n}",), tuned_as="E3RL") for n in (1, 3, 5)
    )


def _table5(scale: Scale) -> tuple[Row, ...]:
    """Segments × length at a constant product."""
    return tuple(
        Row(
            f"{count}x{length}",
            ("methods/e3rl",),
            (f"rollout.max_segments={count}", f"rollout.segment_length={length}"),
            tuned_as="E3RL",
            paper=f"{count}x{_PAPER_TOKENS // count}",
        )
        for count, length in scale.segments
    )


_PAPER_TOKENS = 8192
"""Segments times length in the paper's table 5."""


def _same(rows: Sequence[Row]) -> Callable[[Scale], Sequence[Row]]:
    return lambda scale: rows


def _avg(table: str) -> Accuracy:
    return Accuracy("avg", table, "avg@32")


def _pass(table: str) -> Accuracy:
    return Accuracy("pass", table, "pass@32")


_COST = {"accuracy": "accuracy", "length": "length", "segments": "segments", "r": "r", "erase_rate": "erase rate"}
_DYNAMICS = {
    "accuracy": "training accuracy",
    "finish_ratio": "finish ratio",
    "length": "length, tokens",
    "segments": "segments",
}
_ERASED = "With erasing, training accuracy is that of what was kept: it is not comparable with plain rollouts'."


def _e3rl_paper(
    name: str,
    title: str,
    rows: Sequence[Row] | Callable[[Scale], Sequence[Row]],
    views: tuple[View, ...],
    models: tuple[str, ...] = ("Qwen3-4B", "Qwen3-8B"),
    measures: Callable[[Scale], Sequence[Measure]] = plain_exams,
) -> Study:
    chosen = rows if callable(rows) else _same(rows)
    return Study(name, title, chosen, measures, views, models, METHODS)


def _ablation_study(number: int, rows: Sequence[Row], what: str, show: Accuracy) -> Study:
    views = (accuracy(show), against_full(show, "E3RL"), training_table(_COST), paper_numbers(show))
    return _e3rl_paper(f"table{number}", f"Table {number}: {what}", rows, views, ("Qwen3-4B",))


def _pass_exams(scale: Scale) -> tuple[Measure, ...]:
    return (pass_exam(scale),)


def _e3rl_studies() -> list[Study]:
    avg, passed = _avg("table1"), _pass("table1")
    baselines = (*_BASELINES, "ERPO")
    margin = margins(avg, "E3RL", baselines, "SAPO")
    methods = (
        accuracy(avg),
        margin,
        accuracy(passed),
        margins(passed, "E3RL", baselines, "SAPO"),
        training_table(_COST),
        rates_table,
        paper_numbers(avg),
        paper_numbers(passed),
    )
    table4 = (
        accuracy(_avg("table4")),
        against_full(_avg("table4"), "erase@5"),
        training_table(_COST),
        paper_numbers(_avg("table4")),
    )
    table5 = (accuracy(_avg("table5")), training_table(_COST), paper_numbers(_avg("table5")))
    big = ("Qwen3-8B",)
    curves = training_curves("Training dynamics", _DYNAMICS, _ERASED)
    by_budget = training_curves("Training dynamics by erasures allowed", {**_DYNAMICS, "r": "r"})
    by_segment = (segment_curves("uncertainty", "Uncertainty"), segment_curves("acceptance", "Acceptance"))
    passes = (pass_curves("table6"),)
    return [
        _e3rl_paper("table1", "Table 1: methods", _TABLE1, methods),
        _ablation_study(2, _TABLE2, "components of the uncertainty", _avg("table2")),
        _ablation_study(3, _TABLE3, "mechanisms", _avg("table3")),
        _e3rl_paper("table4", "Table 4: erasures allowed a segment", _table4, table4, big),
        _e3rl_paper("table5", "Table 5: segments × length", _table5, table5, big),
        _e3rl_paper("table6", "Table 6: Pass@k", _TABLE1, passes, measures=_pass_exams),
        _ablation_study(7, _TABLE2, "components of the uncertainty, Pass@k", _pass("table7")),
        _ablation_study(8, _TABLE3, "mechanisms, Pass@k", _pass("table8")),
        _e3rl_paper("fig1", "Figure 1: methods", _TABLE1, (accuracy_bars(avg), margin)),
        _e3rl_paper("fig3", "Figure 3: training dynamics", _TABLE1, (curves,)),
        _e3rl_paper("fig4", "Figure 4: Pass@k", _TABLE1, passes, measures=_pass_exams),
        _e3rl_paper("fig5", "Figure 5: training under Erase@k", _table4, (by_budget,), big),
        _e3rl_paper("fig6", "Figure 6: segments over training under Erase@k", _table4, by_segment, big),
    ]


def _erpo_paper(
    name: str,
    title: str,
    rows: Sequence[Row],
    views: tuple[View, ...],
    measures: Callable[[Scale], Sequence[Measure]] = plain_exams,
) -> Study:
    models = ("Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B")
    return Study(name, title, _same(rows), measures, views, models, METHODS, scales={"paper": ERPO_PAPER})


def _erpo_studies() -> list[Study]:
    show, boxed = Accuracy("avg", "erpo-table1", "avg@16"), Accuracy("boxed", "erpo-table1", "boxed@16")
    rows = (_BASE, *(METHODS[name] for name in ("SFT", "GRPO", "ERPO")))
    pair = tuple(METHODS[name] for name in ("GRPO", "ERPO"))
    methods = (
        accuracy(show),
        margins(show, "ERPO", ("Base", "SFT", "GRPO"), "GRPO"),
        accuracy(boxed),
        rates_table,
        paper_numbers(show),
        paper_numbers(boxed),
    )
    dynamics = {"reward": "reward", "entropy": "entropy", "grad_norm": "gradient norm", "kl": "KL"}
    cost = {"length": "length, tokens", "seconds_train": "seconds of learning, a step"}
    return [
        _erpo_paper("erpo-table1", "ERPO, table 1: methods", rows, methods),
        _erpo_paper("erpo-table2", "ERPO, table 2: Pass@k", rows, (pass_curves("erpo-table2"),), _pass_exams),
        _erpo_paper(
            "erpo-fig1",
            "ERPO, figure 1: entropies, and what perturbing them does",
            (_BASE,),
            (entropy_histogram, perturbation_table),
            perturbation_measures,
        ),
        _erpo_paper(
            "erpo-fig2",
            "ERPO, figure 2: training",
            pair,
            (training_curves("Accuracy", {"accuracy": "training accuracy"}),),
        ),
        _erpo_paper("erpo-fig3", "ERPO, figure 3: dynamics", pair, (training_curves("Training dynamics", dynamics),)),
        _erpo_paper(
            "erpo-fig4",
            "ERPO, figure 4: conciseness and cost",
            pair,
            (conciseness, training_curves("Length and time", cost)),
        ),
    ]


STUDIES = {study.name: study for study in (*_e3rl_studies(), *_erpo_studies(), WHEN, SETTLE, CONFIRM)}


GROUPS: dict[str, tuple[str, ...]] = {}
"""Names that stand for several studies."""


def find_studies(name: str) -> list[Study]:
    """A study by name, or all of a group."""
    if name in GROUPS:
        return [STUDIES[member] for member in GROUPS[name]]
    if name not in STUDIES:
        raise unknown("study", name, {**STUDIES, **GROUPS})
    return [STUDIES[name]]
