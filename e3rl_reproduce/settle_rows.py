"""What `e3rl reproduce settle` and `confirm` train, and what is compared with what, by setting."""

from __future__ import annotations

from dataclasses import dataclass, replace

from e3rl_reproduce.cells import Measure
from e3rl_reproduce.measures import DECODINGS
from e3rl_reproduce.settle_scales import CHAIN_3_NOISE, MORE_NOISE, NOISE
from e3rl_reproduce.study import Row, Scale

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
    """Rows on the same problems from the same weights. All are compared with the first, and ``pairs`` with each other.

    ``bound``: rows judged by an oracle of 0.95 are among them, and theory predicts them.
    """

    title: str
    rows: tuple[Row, ...]
    pairs: tuple[tuple[str, str], ...]
    noise: float = NOISE
    bound: bool = False

    @property
    def base(self) -> str:
        return self.rows[0].label


def _oracle(name: str) -> tuple[str, ...]:
    return (*_JUDGED, f"erasure.metric=e3rl_reproduce.oracle:oracle_{name}")


def _credit(name: str) -> tuple[str, ...]:
    """The same labels as rewards for segments: everything is judged and nothing erased."""
    return (_STEP_CREDIT, _SEQUENCE, *_oracle(name), _NOTHING_ERASED)


_CRITIC = ("rollout.erase=true", "erasure.metric=value", _NOTHING_ERASED)
_CRITIC_CREDIT = (_STEP_CREDIT, _SEQUENCE, *_CRITIC)

COLDER = Measure(
    DECODINGS, "steps", {"tuning": 32, "problems": 64, "samples": 4, "ways": [[1.0, ""], [0.6, ""], [0.3, ""]]}
)
"""What a lower temperature does with the last weights."""
_COLDER_SEARCHES = replace(COLDER, options={"tuning": 16, "problems": 64, "samples": 4, "ways": [[1.0, ""], [0.6, ""]]})

GRPO, CONTRAST, DROPPED = "GRPO", "oracle 0.95, contrast", "oracle 0.95, dropped"
LOSS, CREDIT = "E³RL's loss, plain rollouts", "step credit 0.95, plain rollouts"
LIKELY, LEARNT = "step credit by entropy + 0.3 ε, plain rollouts", "step credit by the critic, plain rollouts"
CAREFUL = "step credit by the critic where rewards differ, plain rollouts"
ERASED_UNLIKELY = "erased by entropy + 0.3 ε, contrast"
RESET, PRUNED = "reset before the worst step, oracle 0.95", "pruned halfway, oracle 0.95"
BRANCHED, RESET_LEARNT, PRUNED_LEARNT = (
    "branches at random",
    "reset before the worst step, critic",
    "pruned halfway, critic",
)
_PUBLISHED = (BRANCHED, RESET_LEARNT, PRUNED_LEARNT)
SHOWN = (GRPO, DROPPED, CONTRAST, CREDIT, RESET, LEARNT, LOSS, "E³RL", BRANCHED, RESET_LEARNT)
"""What the plot draws, as many as there are colours."""


def _two_rounds(label: str, kind: str, judged: tuple[str, ...], seeds: int = 0) -> Row:
    """GRPO on groups that `e3rl_reproduce.resumed` makes."""
    rollouts = f"e3rl_reproduce.resumed:{kind}"
    return Row(label, ("methods/grpo",), judged, measures=(COLDER,), rollouts=rollouts, seeds=seeds)


_BOUND = Comparison(
    "chain 4",
    (
        Row(GRPO, ("methods/grpo",), measures=(COLDER,)),
        Row(DROPPED, ("methods/grpo",), _oracle("95")),
        Row(CONTRAST, ("methods/e3rl",), (*_CONTRAST, *_oracle("95")), measures=(COLDER,)),
        Row(CREDIT, ("methods/e3rl",), _credit("95"), measures=(COLDER,)),
        _two_rounds(RESET, "reset", (*_oracle("95"), _NOTHING_ERASED)),
        _two_rounds(PRUNED, "pruned", (*_oracle("95"), _NOTHING_ERASED), 4),
        Row("oracle 0.85, contrast", ("methods/e3rl",), (*_CONTRAST, *_oracle("85")), seeds=4),
        Row("oracle 0.70, contrast", ("methods/e3rl",), (*_CONTRAST, *_oracle("70")), seeds=4),
        Row("step credit 0.85, plain rollouts", ("methods/e3rl",), _credit("85"), seeds=4),
        Row("step credit 0.70, plain rollouts", ("methods/e3rl",), _credit("70"), seeds=4),
        Row(LEARNT, ("methods/e3rl",), _CRITIC_CREDIT, measures=(COLDER,)),
        Row(LOSS, ("methods/e3rl",), (_SEQUENCE, _PLAIN), measures=(COLDER,)),
        _two_rounds(BRANCHED, "branched", (_PLAIN,)),
        _two_rounds(RESET_LEARNT, "reset", _CRITIC),
        _two_rounds(PRUNED_LEARNT, "pruned", _CRITIC),
        Row(
            CAREFUL,
            ("methods/e3rl",),
            (*_CRITIC_CREDIT, "objective.credit_groups=mixed"),
            measures=(COLDER,),
            seeds=4,
        ),
        Row(
            LIKELY,
            ("methods/e3rl",),
            (_STEP_CREDIT, _SEQUENCE, *_UNANSWERED, _NOTHING_ERASED),
            measures=(COLDER,),
            seeds=4,
        ),
        Row(
            ERASED_UNLIKELY,
            ("methods/e3rl",),
            (*_CONTRAST, *_UNANSWERED, "erasure.baseline=quantile", "erasure.quantile=0.5"),
            measures=(COLDER,),
            seeds=4,
        ),
    ),
    (
        (CONTRAST, CREDIT),
        (RESET, CREDIT),
        (CONTRAST, RESET),
        ("oracle 0.85, contrast", "step credit 0.85, plain rollouts"),
        ("oracle 0.70, contrast", "step credit 0.70, plain rollouts"),
        (CONTRAST, DROPPED),
        (CONTRAST, LOSS),
        (CREDIT, LOSS),
        (LEARNT, LOSS),
        *((LEARNT, other) for other in _PUBLISHED),
        (LIKELY, LOSS),
    ),
    bound=True,
)


def _like_bound(title: str, prefix: str, settings: tuple[str, ...], labels: tuple[str, ...], seeds: int) -> Comparison:
    """Some of the bound's rows with other settings, named by a prefix."""
    rows = tuple(
        replace(row, label=f"{prefix}: {row.label}", overrides=(*row.overrides, *settings), seeds=seeds)
        for row in _BOUND.rows
        if row.label in labels
    )
    return Comparison(title, rows, ())


def _faster(rate: str, seeds: int = 0) -> Comparison:
    """The rows that matter at another learning rate."""
    labels = (GRPO, CONTRAST, LOSS, CREDIT, LEARNT)
    return _like_bound(
        f"chain 4, learning rate {rate}", f"rate {rate}", (f"train.learning_rate={rate}",), labels, seeds
    )


def _elsewhere(title: str, *settings: str, noise: float = NOISE) -> Comparison:
    """The bound at another success rate or number of segments."""
    labels = (GRPO, DROPPED, CONTRAST, CREDIT, RESET)
    found = _like_bound(title, title, settings, labels, 4)
    rows = tuple(replace(row, measures=()) for row in found.rows)
    contrast, credit, reset = (f"{title}: {label}" for label in (CONTRAST, CREDIT, RESET))
    return replace(found, rows=rows, pairs=((contrast, credit), (reset, credit)), noise=noise, bound=True)


_ELSEWHERE = (
    _elsewhere("chain 4, start 0.05", noise=MORE_NOISE),
    _elsewhere(
        "chain 3, start 0.3",
        "data.train=lab:chain:3",
        "data.eval=lab:chain:3",
        "rollout.max_segments=6",
        noise=CHAIN_3_NOISE,
    ),
    _elsewhere("chain 4, 2 segments", "rollout.segment_length=32", "rollout.max_segments=2"),
    _elsewhere("chain 4, 13 segments", "rollout.segment_length=5", "rollout.max_segments=13"),
    _elsewhere("chain 4, 16 segments", "rollout.segment_length=4", "rollout.max_segments=16"),
)


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


def _search(label: str, overlay: str, *settings: str, seeds: int = 4, rollouts: str = "") -> Row:
    return Row(
        f"maze: {label}",
        (f"methods/{overlay}",),
        (*_MAZE, *settings),
        measures=(_COLDER_SEARCHES,),
        rollouts=rollouts and f"e3rl_reproduce.resumed:{rollouts}",
        seeds=seeds,
    )


_SEARCHES = Comparison(
    "maze 4, as the paper trains",
    (
        _search(GRPO, "grpo", seeds=0),
        _search("GRPO, overlong shaping", "grpo", "rewards.overlong=true"),
        _search("E³RL", "e3rl", *_PAPER_ON_MAZE),
        _search("E³RL, contrast", "e3rl", *_PAPER_ON_MAZE, "objective.erased=contrast"),
        _search(LOSS, "e3rl", _SEQUENCE, _PLAIN),
        _search(LIKELY, "e3rl", _STEP_CREDIT, _SEQUENCE, *_UNANSWERED, _NOTHING_ERASED),
        _search(LEARNT, "e3rl", *_CRITIC_CREDIT, seeds=0),
        _search(BRANCHED, "grpo", _PLAIN, rollouts="branched"),
        _search(RESET_LEARNT, "grpo", *_CRITIC, rollouts="reset"),
        _search(PRUNED_LEARNT, "grpo", *_CRITIC, rollouts="pruned"),
    ),
    (
        ("maze: E³RL, contrast", "maze: E³RL"),
        ("maze: " + LIKELY, "maze: " + LOSS),
        ("maze: " + LEARNT, "maze: " + LOSS),
        *(("maze: " + LEARNT, "maze: " + other) for other in _PUBLISHED),
    ),
)


def _graphs(family: str, seeds: int = 0) -> Comparison:
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
            Row(f"{family}: {GRPO}", ("methods/grpo",), shared, measures=(COLDER,), seeds=seeds),
            Row(f"{family}: {LOSS}", ("methods/e3rl",), (*shared, _SEQUENCE, _PLAIN), measures=(COLDER,), seeds=seeds),
            Row(f"{family}: {LIKELY}", ("methods/e3rl",), likely, measures=(COLDER,), seeds=seeds),
            Row(f"{family}: {LEARNT}", ("methods/e3rl",), (*shared, *_CRITIC_CREDIT), measures=(COLDER,), seeds=seeds),
        ),
        ((f"{family}: {LIKELY}", f"{family}: {LOSS}"), (f"{family}: {LEARNT}", f"{family}: {LOSS}")),
    )


def _unmeasured(setting: Comparison) -> Comparison:
    """Without decoding at several temperatures."""
    return replace(setting, rows=tuple(replace(row, measures=()) for row in setting.rows))


_SMOKE = _unmeasured(
    Comparison(
        "chain 1",
        tuple(row for row in _BOUND.rows if row.label in (GRPO, CONTRAST, CREDIT, RESET, PRUNED)),
        _BOUND.pairs[:1],
        bound=True,
    )
)


def _only_credit(setting: Comparison, prefix: str) -> Comparison:
    """GRPO, E³RL's loss and step credit by the critic, which is compared with both."""
    ours, labels = f"{prefix}{LEARNT}", (f"{prefix}{GRPO}", f"{prefix}{LOSS}", f"{prefix}{LEARNT}")
    rows = tuple(replace(row, seeds=0) for row in setting.rows if row.label in labels)
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
    "lab": (
        _BOUND,
        *_ELSEWHERE,
        _faster("2e-4", 4),
        _SEARCHES,
        _graphs("path", 4),
        _graphs("ways", 4),
    ),
    "confirm-smoke": (_only_credit(_unmeasured(replace(_BOUND, title="chain 1", bound=False)), ""),),
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
