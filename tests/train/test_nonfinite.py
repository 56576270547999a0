"""NaN, infinite and exploding numbers are found, located and kept from the weights, and their batch can be replayed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from e3rl.cli.main import main
from e3rl.config import TrainConfig
from e3rl.errors import UserError
from e3rl.models import load_policy
from e3rl.objectives import build as build_objective
from e3rl.objectives.base import Loss, TrainBatch
from e3rl.train.checkpoint import newest_checkpoint
from e3rl.train.collect import StepGroups
from e3rl.train.learner import Learner
from e3rl.train.lessons import Lesson
from e3rl.train.listeners import Silent
from e3rl.train.loop import learn_or_skip
from e3rl.train.nonfinite import (
    KEPT,
    NonFinite,
    NonFiniteNumbers,
    SkippedStep,
    read_skipped,
    skip_step,
    skipped_steps,
    write_skipped,
)
from e3rl.train.prompts import load_prompts
from e3rl.train.run_directory import RunDirectory, read_lines
from e3rl.train.state import save
from e3rl.train.trainer import Trainer
from tests.train.random_lab import lab_config
from tests.train.rollouts import rewarded_group
from tests.train.test_learner import GROUPS, _learner


def _changed(lessons: list[Lesson], index: int, position: int, **field: float) -> list[Lesson]:
    """The lessons with one number of one of them changed."""
    lesson = lessons[index]
    [(name, value)] = field.items()
    if name == "logprobs_T":
        numbers = lesson.scores.logprobs_T.clone()
        numbers[position] = value
        lesson = replace(lesson, scores=replace(lesson.scores, logprobs_T=numbers))
    else:
        numbers = getattr(lesson, name).clone()
        numbers[position] = value
        lesson = replace(lesson, **{name: numbers})
    return [*lessons[:index], lesson, *lessons[index + 1 :]]


def _caught(learner: Learner, lessons: list[Lesson]) -> NonFinite:
    """What the learner finds; its weights must be as before."""
    before = {k: v.detach().clone() for k, v in learner.optimizer.weights().items()}
    with pytest.raises(NonFiniteNumbers) as caught:
        learner.update(lessons, 7)
    assert all(torch.equal(before[k], v) for k, v in learner.optimizer.weights().items())
    assert not any(k.endswith("/step") for k in learner.optimizer.state())
    return caught.value.finding


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("advantages_T", float("nan"), "advantage"),
        ("advantages_T", float("inf"), "advantage"),
        ("logprobs_T", float("-inf"), "old log-probability"),
        ("reference_logprobs_T", float("nan"), "reference log-probability"),
        ("logprobs_T", -90.0, "log of a token's probability ratio"),
        ("reference_logprobs_T", 20.0, "mean KL to the reference policy"),
    ],
)
def test_a_non_finite_number_is_located(field: str, value: float, what: str):
    learner = _learner(kl_coef=0.1)
    lessons = learner.prepare(GROUPS)
    index = next(i for i, x in enumerate(lessons) if (x.sequence.group, x.sequence.sibling) == (1, 1))
    position = 5  # in its second segment
    finding = _caught(learner, _changed(lessons, index, position, **{field: value}))
    assert (finding.what, finding.group, finding.sibling) == (what, 1, 1)
    if "KL" not in what:
        assert (finding.segment, finding.token) == (1, 5)
        assert finding.sentence("first").endswith("at prompt 'first', sibling 1, segment 1, response token 5")
    after = learner.update(lessons, 7)  # and the next step is as if nothing had been
    assert after.grad_norm > 0


def test_padding_may_hold_anything():
    learner = _learner(kl_coef=0.1)
    learner.update(learner.prepare(GROUPS), 0)  # rows of different length: what is masked is not looked at


class _RootLoss:
    """An objective whose loss is finite and whose gradient is not: the square root at 0."""

    needs: frozenset[str] = frozenset()

    def advantages(self, signals: object) -> torch.Tensor:
        return torch.zeros_like(signals.mask_GT, dtype=torch.float32)  # type: ignore[attr-defined]

    def erased_advantage(self, reward: float) -> float:
        return 0.0

    def loss(self, batch: TrainBatch) -> Loss:
        return Loss((batch.logprobs_ST.sum() * 0).sqrt(), {})


def test_parameters_with_a_non_finite_gradient_are_named():
    learner = _learner()
    learner._objective = _RootLoss()  # type: ignore[assignment]
    finding = _caught(learner, learner.prepare(GROUPS))
    assert finding.what == "gradient"
    assert "model.layers.0.mlp.up_proj.weight" in finding.parameters
    assert "parameters (" in finding.sentence()


def test_the_limits_are_settings():
    tight = TrainConfig(learning_rate=0.1, warmup_ratio=0.0, max_log_ratio=1e-9)
    learner = _learner(train=tight, kl_coef=0.0)
    lessons = learner.prepare(GROUPS)
    shifted = _changed(lessons, 0, 0, logprobs_T=float(lessons[0].scores.logprobs_T[0]) + 1e-3)
    assert _caught(learner, shifted).what == "log of a token's probability ratio"
    close = _learner(train=replace(tight, max_log_ratio=40.0, max_kl=1e-9), kl_coef=0.1)
    lessons = close.prepare(GROUPS)
    assert lessons[0].reference_logprobs_T is not None
    moved = _changed(lessons, 0, 0, reference_logprobs_T=float(lessons[0].reference_logprobs_T[0]) + 0.1)
    assert _caught(close, moved).what == "mean KL to the reference policy"


def _skipped(step: int) -> SkippedStep:
    finding = NonFinite("advantage", float("inf"), 1, 0, 2, 9)
    return SkippedStep(step, step - 1, "text", finding, tuple(GROUPS), {"w": torch.tensor([float(step)])})


def test_a_skipped_step_comes_back_whole(tmp_path: Path):
    write_skipped(tmp_path, _skipped(7))
    back = read_skipped(tmp_path, 7)
    assert (back.finding, back.text, back.update) == (_skipped(7).finding, "text", 6)
    assert [g.rewards for g in back.batch] == [tuple(g.rewards) for g in GROUPS]
    for found, made in zip(back.batch, GROUPS, strict=True):
        assert found.group.prompt.ids == made.group.prompt.ids
        assert [t.segments for t in found.group.trajectories] == [t.segments for t in made.group.trajectories]
        assert [t.erasures for t in found.group.trajectories] == [t.erasures for t in made.group.trajectories]
    assert torch.equal(back.weights["w"], torch.tensor([7.0]))
    path = tmp_path / "skipped" / "step-000007" / "batch.arrow"
    path.write_bytes(path.read_bytes().replace(b"first", b"First"))
    with pytest.raises(UserError, match=r"step-000007 is damaged: batch\.arrow does not match"):
        read_skipped(tmp_path, 7)


def test_only_the_newest_skipped_steps_are_kept(tmp_path: Path):
    for step in (1, 2, 5, 9):
        write_skipped(tmp_path, _skipped(step))
    assert skipped_steps(tmp_path) == [9, 5, 2]
    assert KEPT == 3


def test_steps_are_skipped_within_the_limit(tmp_path: Path):
    found = NonFiniteNumbers(NonFinite("loss", float("nan"), group=1), 3)

    def skip(step: int, before: int, limit: int) -> str:
        return skip_step(tmp_path, found, step, GROUPS, {}, before=before, limit=limit)

    assert skip(5, 1, 2).startswith("the loss is nan at prompt 'second', in step 5: the step is skipped")
    with pytest.raises(UserError, match=r"the 2 steps before were skipped already \(train\.max_skipped_steps = 2\)"):
        skip(6, 2, 2)
    with pytest.raises(UserError, match=r"in step 7 \(train\.max_skipped_steps = 0\).*e3rl replay"):
        skip(7, 0, 0)
    assert skipped_steps(tmp_path) == [7, 6, 5]


def _learning(tmp_path: Path, learner: Learner) -> tuple[Any, Any]:
    """What `learn_or_skip` needs of a run and its state."""
    train = replace(TrainConfig(), max_skipped_steps=2)
    run = SimpleNamespace(
        learner=learner,
        config=SimpleNamespace(train=train),
        path=tmp_path,
        ranks=SimpleNamespace(first=True),
        note=lambda _: None,
    )
    return run, SimpleNamespace(optimizer=learner.optimizer, skipped=0)


def test_a_skipped_step_teaches_nothing_and_the_next_one_does(tmp_path: Path):
    learner = _learner(kl_coef=0.0, train=TrainConfig(learning_rate=0.1, warmup_ratio=0.0, max_log_ratio=1e-12))
    run, state = _learning(tmp_path, learner)
    before = {k: v.detach().clone() for k, v in learner.optimizer.weights().items()}
    learner._objective = _RootLoss()  # type: ignore[assignment]
    groups = StepGroups(tuple(GROUPS))
    _, lessons, update = learn_or_skip(run, state, groups, 0, 1)
    assert (lessons, update.means, state.skipped) == ([], {}, 1)
    assert update.grad_norm != update.grad_norm
    assert all(torch.equal(before[k], v) for k, v in learner.optimizer.weights().items())
    assert all(torch.equal(before[k], v) for k, v in read_skipped(tmp_path, 1).weights.items())
    learn_or_skip(run, state, groups, 1, 2)
    assert state.skipped == 2
    learner._objective = _learner(kl_coef=0.0)._objective
    assert learn_or_skip(run, state, groups, 2, 3)[2].grad_norm > 0
    assert state.skipped == 0, "only steps in a row count"


def _skipped_run(tmp_path: Path, harm: str) -> Path:
    """A run directory with a skipped step of the lab's model, in which one weight is ``harm``."""
    config = lab_config(tmp_path, "objective.kl_coef=0.0")
    run = RunDirectory.create(config).path
    policy = load_policy(config.model)
    rendered = load_prompts(config, policy)[0][config.data.train][:2]
    learner = Learner(policy, build_objective(config.objective), config, updates=1)
    with torch.no_grad():
        weight = policy.model.model.layers[1].mlp.down_proj.weight
        weight[3, 4] = float(harm)
    trajectories = [rewarded_group(p.problem.id, [1.0, 0.0], [[3], [4]]) for p in rendered]
    learn_or_skip(*_learning(run, learner), StepGroups(tuple(trajectories)), 0, 1)
    return run


def test_replay_names_the_module_in_which_the_numbers_go_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = _skipped_run(tmp_path, "nan")
    assert main(["replay", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("step 1 was skipped: the log-probability is nan at prompt ")
    assert "first in the output of model.layers.1.mlp.down_proj" in said[1]
    assert len(said) == 4
    assert all("rewards 1, 0; tokens 3, 4: the log-probability is nan" in line for line in said[2:])


def test_replay_without_a_skipped_step_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["replay", str(tmp_path)]) == 2
    assert "has skipped no step" in capsys.readouterr().err
    write_skipped(tmp_path, _skipped(7))
    assert main(["replay", str(tmp_path), "--step", "6"]) == 2
    assert "keeps no skipped step 6; it keeps 7" in capsys.readouterr().err


class _Harm(Silent):
    """Makes a weight infinite before the second step, and well again before the third."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.notes: list[str] = []

    def stepped(self, record: Mapping[str, Any]) -> None:
        assert self.trainer is not None
        learner = self.trainer.run.learner
        if record["step"] == 1:
            self._well, learner._objective = learner._objective, _RootLoss()  # type: ignore[assignment]
        elif record["step"] == 2:
            learner._objective = self._well

    def noted(self, text: str) -> None:
        self.notes.append(text)


def test_a_run_skips_a_step_and_goes_on(tmp_path: Path):
    listener = _Harm()
    trainer = listener.trainer = Trainer(lab_config(tmp_path, "train.steps=3"), listeners=[listener])
    trainer.train()
    records = read_lines(trainer.run_path / "metrics.jsonl")
    assert [r["skipped"] for r in records] == [0, 1, 0]
    assert records[1]["grad_norm"] is None, "never a silent zero"
    assert "loss" not in records[1]
    assert records[2]["grad_norm"] is not None
    assert [n for n in listener.notes if "in step 2: the step is skipped" in n]
    assert skipped_steps(trainer.run_path) == [2]


def test_a_run_stops_where_the_limit_is_reached(tmp_path: Path):
    listener = _Harm()
    trainer = Trainer(lab_config(tmp_path, "train.steps=3", "train.max_skipped_steps=0"), listeners=[listener])
    listener.trainer = trainer
    with pytest.raises(UserError, match=r"the gradient is nan.*in step 2 \(train\.max_skipped_steps = 0\)"):
        trainer.train()


class _Overflow(Silent):
    """Makes a weight infinite while step 2 is told."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def stepped(self, record: Mapping[str, Any]) -> None:
        assert self.trainer is not None
        if record["step"] == 2:
            learner = self.trainer.run.learner
            real = learner.optimizer.step

            def step(rate: float) -> float:
                norm = real(rate)
                next(self.trainer.policy.model.parameters()).data.view(-1)[3] = float("inf")  # type: ignore[union-attr]
                return norm

            learner.optimizer.step = step  # type: ignore[method-assign]


def test_weights_that_are_no_longer_finite_are_never_saved(tmp_path: Path):
    listener = _Overflow()
    trainer = listener.trainer = Trainer(
        lab_config(tmp_path, "train.steps=4", "train.save_steps=1"), listeners=[listener]
    )
    with pytest.raises(UserError, match=r"after step 3, 1 parameters hold NaN or infinite numbers \(model\.embed"):
        trainer.train()
    saved = newest_checkpoint(trainer.run_path)
    assert saved.step == 2
    assert all(bool(t.isfinite().all()) for t in saved.weights.values())
    with pytest.raises(UserError, match="at step 2, 1 parameters hold"):
        save(trainer.run, trainer.state)


def test_settings_that_overflow_weights_are_refused(tmp_path: Path):
    for setting in ("train.weight_decay=1e300", "train.learning_rate=1e3"):
        with pytest.raises(UserError, match="is out of range"):
            lab_config(tmp_path, setting)
