"""The papers' tables and figures, each as rows and views. `STUDIES` is the table that `e3rl reproduce` looks names up in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from e3rl.errors import unknown
from e3rl.reproduce.curves import rates_table, segment_curves, training_curves, training_table
from e3rl.reproduce.probes import conciseness, entropy_histogram, perturbation_measures, perturbation_table
from e3rl.reproduce.scales import Scale
from e3rl.reproduce.study import Row, Study, pass_exam, plain_exams
from e3rl.reproduce.views import Accuracy, accuracy, against_full, margins, paper_numbers, pass_curves

_E3RL_MODELS = ("Qwen3-4B", "Qwen3-8B")
_ERPO_MODELS = ("Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B")

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


def _component_study(number: int, rows: Sequence[Row], what: str, show: Accuracy) -> Study:
    return Study(
        f"table{number}",
        f"Table {number}: {what}",
        _same(rows),
        plain_exams,
        (accuracy(show), against_full(show, "E3RL"), training_table(_COST), paper_numbers(show)),
        ("Qwen3-4B",),
        METHODS,
    )


_COST = {"accuracy": "accuracy", "length": "length", "segments": "segments", "r": "r", "erase_rate": "erase rate"}
_DYNAMICS = {
    "accuracy": "training accuracy",
    "finish_ratio": "finish ratio",
    "length": "length, tokens",
    "segments": "segments",
}
_ERASED = "With erasing, training accuracy is that of what was kept: it is not comparable with plain rollouts'."


def _all_studies() -> list[Study]:
    margin = margins(_avg("table1"), "E3RL", (*_BASELINES, "ERPO"), "SAPO")
    pass_margin = margins(_pass("table1"), "E3RL", (*_BASELINES, "ERPO"), "SAPO")
    table1_views = (
        accuracy(_avg("table1")),
        margin,
        accuracy(_pass("table1")),
        pass_margin,
        training_table(_COST),
        rates_table,
        paper_numbers(_avg("table1")),
        paper_numbers(_pass("table1")),
    )
    erpo_rows = (_BASE, *(METHODS[name] for name in ("SFT", "GRPO", "ERPO")))
    pair = tuple(METHODS[name] for name in ("GRPO", "ERPO"))
    kinds = {4: (_table4, "erasures allowed a segment", "erase@5"), 5: (_table5, "segments × length", "")}
    return [
        Study("table1", "Table 1: methods", _same(_TABLE1), plain_exams, table1_views, _E3RL_MODELS, METHODS),
        _component_study(2, _TABLE2, "components of the uncertainty", _avg("table2")),
        _component_study(3, _TABLE3, "mechanisms", _avg("table3")),
        *(
            Study(
                f"table{number}",
                f"Table {number}: {what}",
                rows,
                plain_exams,
                (
                    accuracy(_avg(f"table{number}")),
                    *((against_full(_avg(f"table{number}"), full),) if full else ()),
                    training_table(_COST),
                    paper_numbers(_avg(f"table{number}")),
                ),
                ("Qwen3-8B",),
                METHODS,
            )
            for number, (rows, what, full) in kinds.items()
        ),
        Study(
            "table6",
            "Table 6: Pass@k",
            _same(_TABLE1),
            lambda scale: (pass_exam(scale),),
            (pass_curves("table6"),),
            _E3RL_MODELS,
            METHODS,
        ),
        _component_study(7, _TABLE2, "components of the uncertainty, Pass@k", _pass("table7")),
        _component_study(8, _TABLE3, "mechanisms, Pass@k", _pass("table8")),
        Study(
            "fig1",
            "Figure 1: methods",
            _same(_TABLE1),
            plain_exams,
            (accuracy(_avg("table1")), margin),
            _E3RL_MODELS,
            METHODS,
        ),
        Study(
            "fig3",
            "Figure 3: training dynamics",
            _same(_TABLE1),
            plain_exams,
            (training_curves("Training dynamics", _DYNAMICS, _ERASED),),
            _E3RL_MODELS,
            METHODS,
        ),
        Study(
            "fig4",
            "Figure 4: Pass@k",
            _same(_TABLE1),
            lambda scale: (pass_exam(scale),),
            (pass_curves("table6"),),
            _E3RL_MODELS,
            METHODS,
        ),
        Study(
            "fig5",
            "Figure 5: training under Erase@k",
            _table4,
            plain_exams,
            (training_curves("Training dynamics by erasures allowed", {**_DYNAMICS, "r": "r"}),),
            ("Qwen3-8B",),
            METHODS,
        ),
        Study(
            "fig6",
            "Figure 6: segments over training under Erase@k",
            _table4,
            plain_exams,
            (segment_curves("uncertainty", "uncertainty"), segment_curves("acceptance", "acceptance")),
            ("Qwen3-8B",),
            METHODS,
        ),
        Study(
            "erpo-table1",
            "ERPO, table 1: methods",
            _same(erpo_rows),
            plain_exams,
            (
                accuracy(Accuracy("avg", "erpo-table1", "avg@16")),
                rates_table,
                margins(Accuracy("avg", "erpo-table1", "avg@16"), "ERPO", ("Base", "SFT", "GRPO"), "GRPO"),
                paper_numbers(Accuracy("avg", "erpo-table1", "avg@16")),
            ),
            _ERPO_MODELS,
            METHODS,
        ),
        Study(
            "erpo-table2",
            "ERPO, table 2: Pass@k",
            _same(erpo_rows),
            lambda scale: (pass_exam(scale),),
            (pass_curves("erpo-table2"),),
            _ERPO_MODELS,
            METHODS,
        ),
        Study(
            "erpo-fig1",
            "ERPO, figure 1: entropies, and what perturbing them does",
            _same((_BASE,)),
            perturbation_measures,
            (entropy_histogram, perturbation_table),
            _ERPO_MODELS,
            METHODS,
        ),
        Study(
            "erpo-fig2",
            "ERPO, figure 2: training",
            _same(pair),
            plain_exams,
            (training_curves("Accuracy over training", {"accuracy": "training accuracy"}),),
            _ERPO_MODELS,
            METHODS,
        ),
        Study(
            "erpo-fig3",
            "ERPO, figure 3: reward, entropy, gradient norm, KL",
            _same(pair),
            plain_exams,
            (
                training_curves(
                    "Training dynamics",
                    {"reward": "reward", "entropy": "entropy", "grad_norm": "gradient norm", "kl": "KL"},
                ),
            ),
            _ERPO_MODELS,
            METHODS,
        ),
        Study(
            "erpo-fig4",
            "ERPO, figure 4: conciseness and cost",
            _same(pair),
            plain_exams,
            (
                conciseness,
                training_curves("Length and time", {"length": "length, tokens", "seconds_train": "seconds a step"}),
            ),
            _ERPO_MODELS,
            METHODS,
        ),
    ]


STUDIES = {study.name: study for study in _all_studies()}


def find_study(name: str) -> Study:
    """A study by name."""
    if name not in STUDIES:
        raise unknown("study", name, STUDIES)
    return STUDIES[name]
