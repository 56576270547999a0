"""What `e3rl reproduce settle` and `confirm` train, and what is compared with what, by setting."""

from __future__ import annotations

from dataclasses import dataclass, replace

from e3rl_reproduce.cells import Measure
from e3rl_reproduce.measures import DECODINGS
from e3rl_reproduce.study import LAB, SMOKE, Row, Scale

SCALES = {
    "smoke": replace(
        SMOKE,
        seeds=(0,),
        overrides=(*SMOKE.overrides, "train.eval_steps=1", "train.minibatches=1", "train.learning_rate=5e-5"),
        token_budget=0,
        validation={},
    ),
    "lab": replace(
        LAB,
        seeds=tuple(range(8)),
        learning_rates=(),
        token_budget=0,
        validation={},
        together=1,
        overrides=(
            "data.train=lab:chain:4",
            "data.eval=lab:chain:4",
            "rollout.segment_length=8",
            "rollout.max_segments=8",
            "train.steps=16",
            "train.prompts_per_step=8",
            "train.minibatches=1",
            "train.learning_rate=5e-5",
            "train.eval_steps=8",
            "eval.limit=64",
            "eval.num_samples=4",
        ),
    ),
}

CONFIRMED = {
    "smoke": replace(SCALES["smoke"], name="confirm-smoke"),
    "lab": replace(SCALES["lab"], name="confirm", seeds=tuple(range(8, 24))),
}
"""Seeds that nothing was chosen with: 8 to 15, and 16 to 23 for what was thought of after those."""

_JUDGED = (
    "rollout.erase=true",
    "erasure.baseline=static",
    "erasure.static_baseline=0.5",
    "erasure.eta=0",
)
_SEQUENCE = "objective.allocation=sequence"
_CONTRAST = (_SEQUENCE, "objective.erased=contrast")
_STEP_CREDIT = "objective.credit_weight=1"
_PLAIN = "rollout.erase=false"
_NOTHING_ERASED = "erasure.max_erasures=0"
_UNANSWERED = (
    "rollout.erase=true",
    "erasure.base_weight=1",
    "erasure.gradient_weight=0",
    "erasure.extremum_weight=0",
    "erasure.perturbation_weight=0.3",
    "erasure.smoothing_window=0",
    "erasure.eta=0",
)
"""Judged without answers: mean entropy + 0.3 mean ε."""


@dataclass(frozen=True)
class Comparison:
    """Rows on the same problems from the same weights. All are compared with the first, and ``pairs`` with each other."""

    title: str
    rows: tuple[Row, ...]
    pairs: tuple[tuple[str, str], ...]

    @property
    def base(self) -> str:
        return self.rows[0].label


def _oracle(name: str) -> tuple[str, ...]:
    return (*_JUDGED, f"erasure.metric=e3rl_reproduce.oracle:oracle_{name}")


def _credit(name: str) -> tuple[str, ...]:
    """The same labels as rewards for segments: everything is judged and nothing erased."""
    return (_STEP_CREDIT, _SEQUENCE, *_oracle(name), _NOTHING_ERASED)


_CRITIC_CREDIT = (_STEP_CREDIT, _SEQUENCE, "rollout.erase=true", "erasure.metric=value", _NOTHING_ERASED)

COLDER = Measure(
    DECODINGS, "steps", {"tuning": 32, "problems": 64, "samples": 4, "ways": [[1.0, ""], [0.6, ""], [0.3, ""]]}
)
"""What a lower temperature does with the last weights."""
_COLDER_SEARCHES = replace(COLDER, options={"tuning": 16, "problems": 64, "samples": 4, "ways": [[1.0, ""], [0.6, ""]]})

GRPO, CONTRAST, DROPPED = "GRPO", "oracle 0.95, contrast", "oracle 0.95, dropped"
LOSS, CREDIT = "E³RL's loss, plain rollouts", "step credit 0.95, plain rollouts"
BOTH = "oracle 0.95, contrast and step credit"
STOPPED = "oracle 0.95, contrast, stopped at 62,000 tokens"
"""Evaluated where GRPO's tokens are spent: what the straight line between evaluations takes from the same run."""
CRITIC, LIKELY = "critic's credit, plain rollouts", "step credit by entropy + 0.3 ε, plain rollouts"
CAREFUL = "step credit by the critic where rewards differ, plain rollouts"
ERASED_UNLIKELY = "erased by entropy + 0.3 ε, contrast"
LEARNT = "step credit by the critic, plain rollouts"

_BOUND = Comparison(
    "chain 4",
    (
        Row(GRPO, ("methods/grpo",), measures=(COLDER,)),
        Row(DROPPED, ("methods/grpo",), _oracle("95")),
        Row(CONTRAST, ("methods/e3rl",), (*_CONTRAST, *_oracle("95")), measures=(COLDER,)),
        Row(LOSS, ("methods/e3rl",), (_SEQUENCE, _PLAIN), measures=(COLDER,)),
        Row(CREDIT, ("methods/e3rl",), _credit("95"), measures=(COLDER,)),
        Row("oracle 0.85, contrast", ("methods/e3rl",), (*_CONTRAST, *_oracle("85"))),
        Row("oracle 0.70, contrast", ("methods/e3rl",), (*_CONTRAST, *_oracle("70"))),
        Row(
            "oracle 0.95, whole responses, contrast",
            ("methods/e3rl",),
            (*_CONTRAST, *_oracle("95"), "train.max_tokens=64000"),
            segments=1,
        ),
        Row("step credit 0.85, plain rollouts", ("methods/e3rl",), _credit("85")),
        Row("step credit 0.70, plain rollouts", ("methods/e3rl",), _credit("70")),
        Row(BOTH, ("methods/e3rl",), (_STEP_CREDIT, *_CONTRAST, *_oracle("95"))),
        Row(STOPPED, ("methods/e3rl",), (*_CONTRAST, *_oracle("95"), "train.max_tokens=62000")),
        Row(
            CRITIC,
            ("methods/e3rl",),
            ("objective.allocation=value", "rollout.erase=true", "erasure.metric=value", _NOTHING_ERASED),
            measures=(COLDER,),
        ),
        Row(LIKELY, ("methods/e3rl",), (_STEP_CREDIT, _SEQUENCE, *_UNANSWERED, _NOTHING_ERASED), measures=(COLDER,)),
        Row(
            LEARNT,
            ("methods/e3rl",),
            _CRITIC_CREDIT,
            measures=(COLDER,),
        ),
        Row(
            ERASED_UNLIKELY,
            ("methods/e3rl",),
            (*_CONTRAST, *_UNANSWERED, "erasure.baseline=quantile", "erasure.quantile=0.5"),
            measures=(COLDER,),
        ),
    ),
    (
        (CONTRAST, CREDIT),
        ("oracle 0.85, contrast", "step credit 0.85, plain rollouts"),
        ("oracle 0.70, contrast", "step credit 0.70, plain rollouts"),
        (BOTH, CREDIT),
        (STOPPED, CREDIT),
        (CONTRAST, LOSS),
        (CONTRAST, DROPPED),
        (CREDIT, LOSS),
        (CRITIC, LOSS),
        (LIKELY, LOSS),
        (LEARNT, LOSS),
        (CREDIT, CRITIC),
    ),
)


def _faster(rate: str) -> Comparison:
    """The rows that matter at another learning rate than the one that was chosen for GRPO in a first look."""
    rows = tuple(
        replace(
            row,
            label=f"rate {rate}: {row.label}",
            overrides=(*row.overrides, f"train.learning_rate={rate}"),
            measures=(COLDER,),
        )
        for row in _BOUND.rows
        if row.label in (GRPO, CONTRAST, LOSS, CREDIT, LEARNT)
    )
    return Comparison(f"chain 4, learning rate {rate}", rows, ())


_MAZE = (
    "model.path=lab-maze",
    "data.train=lab:maze:4",
    "data.eval=lab:maze:4",
    "rollout.segment_length=16",
    "rollout.max_segments=6",
    "train.learning_rate=3e-4",
)
_PAPER_ON_MAZE = (*_MAZE, "erasure.kappa0=1.5")
"""A tenth of the segments of the model as it is, by `e3rl calibrate`; the other settings of U are the recipe's."""

_SEARCHES = Comparison(
    "maze 4, as the paper trains",
    (
        Row("maze: GRPO", ("methods/grpo",), _MAZE, measures=(_COLDER_SEARCHES,)),
        Row("maze: GRPO, overlong shaping", ("methods/grpo",), (*_MAZE, "rewards.overlong=true")),
        Row("maze: E³RL", ("methods/e3rl",), _PAPER_ON_MAZE),
        Row("maze: E³RL, contrast", ("methods/e3rl",), (*_PAPER_ON_MAZE, "objective.erased=contrast")),
        Row("maze: " + LOSS, ("methods/e3rl",), (*_MAZE, _SEQUENCE, _PLAIN), measures=(_COLDER_SEARCHES,)),
        Row(
            "maze: " + LIKELY,
            ("methods/e3rl",),
            (*_MAZE, _STEP_CREDIT, _SEQUENCE, *_UNANSWERED, _NOTHING_ERASED),
            measures=(_COLDER_SEARCHES,),
        ),
        Row("maze: " + LEARNT, ("methods/e3rl",), (*_MAZE, *_CRITIC_CREDIT), measures=(_COLDER_SEARCHES,)),
    ),
    (
        ("maze: E³RL, contrast", "maze: E³RL"),
        ("maze: " + LIKELY, "maze: " + LOSS),
        ("maze: " + LEARNT, "maze: " + LOSS),
    ),
)


def _graphs(family: str) -> Comparison:
    """The embedded model as it is, on a family where what follows a mistake is uncertain; segments are half an answer."""
    shared = (
        "model.path=lab",
        f"data.train=lab:{family}:2",
        f"data.eval=lab:{family}:2",
        "rollout.segment_length=4",
        "rollout.max_segments=2",
        "train.learning_rate=1e-4",
        "train.steps=48",
        "train.eval_steps=24",
    )
    likely = (*shared, _STEP_CREDIT, _SEQUENCE, *_UNANSWERED, _NOTHING_ERASED)
    return Comparison(
        f"{family} 2, halves",
        (
            Row(f"{family}: {GRPO}", ("methods/grpo",), shared, measures=(COLDER,)),
            Row(f"{family}: {LOSS}", ("methods/e3rl",), (*shared, _SEQUENCE, _PLAIN), measures=(COLDER,)),
            Row(f"{family}: {LIKELY}", ("methods/e3rl",), likely, measures=(COLDER,)),
            Row(f"{family}: {LEARNT}", ("methods/e3rl",), (*shared, *_CRITIC_CREDIT), measures=(COLDER,)),
        ),
        ((f"{family}: {LIKELY}", f"{family}: {LOSS}"), (f"{family}: {LEARNT}", f"{family}: {LOSS}")),
    )


def _unmeasured(setting: Comparison) -> Comparison:
    """Without decoding at several temperatures."""
    return replace(setting, rows=tuple(replace(row, measures=()) for row in setting.rows))


_SMOKE = _unmeasured(
    Comparison("chain 1", tuple(row for row in _BOUND.rows if row.label in (GRPO, CONTRAST, CREDIT)), _BOUND.pairs[:1])
)


def _only_credit(setting: Comparison, prefix: str) -> Comparison:
    """GRPO, E³RL's loss and step credit by the critic, which is compared with both."""
    ours, labels = f"{prefix}{LEARNT}", (f"{prefix}{GRPO}", f"{prefix}{LOSS}", f"{prefix}{LEARNT}")
    rows = tuple(row for row in setting.rows if row.label in labels)
    return replace(setting, rows=rows, pairs=((ours, labels[0]), (ours, labels[1])))


def _careful(setting: Comparison, prefix: str) -> Comparison:
    """Beside them step credit in groups alone that hold right and wrong answers."""
    [learnt] = [row for row in setting.rows if row.label == f"{prefix}{LEARNT}"]
    label = f"{prefix}{CAREFUL}"
    row = replace(learnt, label=label, overrides=(*learnt.overrides, "objective.credit_groups=mixed"))
    others = tuple((label, other.label) for other in setting.rows)
    return replace(setting, rows=(*setting.rows, row), pairs=(*setting.pairs, *others))


_SETTINGS = {
    "smoke": (_SMOKE,),
    "lab": (_BOUND, _faster("1e-4"), _faster("2e-4"), _SEARCHES, _graphs("path"), _graphs("ways")),
    "confirm-smoke": (_only_credit(_unmeasured(replace(_BOUND, title="chain 1")), ""),),
    "confirm": (
        _careful(_only_credit(_faster("1e-4"), "rate 1e-4: "), "rate 1e-4: "),
        _only_credit(_SEARCHES, "maze: "),
        _only_credit(_graphs("path"), "path: "),
        _only_credit(_graphs("ways"), "ways: "),
    ),
}


def settings(scale: Scale) -> tuple[Comparison, ...]:
    """The lab's at scales that have none of their own."""
    return _SETTINGS.get(scale.name, _SETTINGS["lab"])
