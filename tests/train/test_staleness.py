"""Runs whose rollouts are of weights before the last update (`rollout.staleness`)."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from e3rl.data.stream import PromptStream
from e3rl.errors import RunStopped, UserError
from e3rl.lab.pretrain import CONTEXT, build_model
from e3rl.lab.tokenizer import build_tokenizer
from e3rl.train.collect import roll_out
from e3rl.train.run_directory import read_lines
from e3rl.train.state import group_settings
from e3rl.train.trainer import Trainer
from tests.train.embedded import StopAt, embedded_config, outcome

AHEAD = ("rollout.staleness=1", "train.importance_correction=token_truncate")


@pytest.fixture(scope="module")
def finished_ahead(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("ahead")
    trainer = Trainer(embedded_config(tmp_path, *AHEAD))
    trainer.train()
    return trainer.run_path


def test_ahead_rollouts_are_of_the_weights_one_update_before(finished: Path, finished_ahead: Path):
    """The first step's are fresh; the second's are by the first weights, so they differ from those of a run that waits."""
    ahead, waiting = (read_lines(run / "metrics.jsonl") for run in (finished_ahead, finished))
    assert [r["staleness"] for r in ahead] == [0, 1, 1, 1]
    assert [r["staleness"] for r in waiting] == [0, 0, 0, 0]
    assert ahead[0]["mismatch_max"] < 1e-3 < ahead[2]["mismatch_max"]
    assert all(r["importance_weight"] == pytest.approx(1, abs=0.1) for r in ahead)
    tables = [pq.read_table(run / "rollouts" / "step-000001.parquet").to_pylist() for run in (finished, finished_ahead)]
    assert [r["response"] for r in tables[0]] == [r["response"] for r in tables[1]]


@pytest.mark.parametrize(("event", "nth"), [("progressed", 2), ("stepped", 1), ("evaluated", 3)])
def test_a_stopped_run_that_is_ahead_goes_on_to_the_very_same_end(
    finished_ahead: Path, tmp_path: Path, event: str, nth: int
):
    with pytest.raises(RunStopped):
        Trainer(embedded_config(tmp_path, *AHEAD), listeners=[StopAt(event, nth)]).train()
    trainer = Trainer(embedded_config(tmp_path, *AHEAD), resume=True)
    trainer.train()
    assert outcome(trainer.run_path) == outcome(finished_ahead)


def test_a_run_that_is_ahead_keeps_tokens_that_the_tokenizer_has_no_name_for(tmp_path: Path):
    """A model with more rows than its tokenizer has tokens, as most have, may draw one of those."""
    torch.manual_seed(0)
    tokenizer, padded = build_tokenizer(CONTEXT), tmp_path / "padded"
    model = build_model(tokenizer)
    model.resize_token_embeddings(len(tokenizer) + 64, mean_resizing=False)
    model.save_pretrained(padded)
    tokenizer.save_pretrained(padded)
    config = embedded_config(tmp_path, *AHEAD, f"model.path={padded}", "eval.limit=1", "train.steps=2")
    with pytest.raises(RunStopped):
        Trainer(config, listeners=[StopAt("stepped", 1)]).train()
    trainer = Trainer(config, resume=True)
    trainer.train()
    rows = pq.read_table(trainer.run_path / "rollouts" / "step-000002.parquet").to_pylist()
    assert max(i for row in rows for segment in row["segments"] for i in segment["ids"]) >= len(tokenizer)


STALE = ("rollout.staleness=2", "train.importance_correction=segment_truncate", "train.steps=6")


def _ages(run: Path) -> list[list[int]]:
    """By step: how many updates before its own each candidate was drawn."""
    ages = []
    for step, path in enumerate(sorted((run / "rollouts").glob("*.parquet")), start=1):
        rows = pq.read_table(path).to_pylist()
        ages.append([step - 1 - c["version"] for row in rows for c in (*row["segments"], *row["erasures"])])
    return ages


@pytest.mark.parametrize("slow", ["training", "rollouts"])
def test_staleness_is_bounded_by_its_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str):
    """No candidate is older than two updates, and all are where each update waits for the rollouts that were begun.

    Problems come in the order of the epochs, as in a run that waits.
    """
    trainer = Trainer(embedded_config(tmp_path, *STALE))
    prefetch, learner = trainer.run.prefetch, trainer.run.learner
    learn, learn_arriving = learner.learn, learner.learn_arriving

    def learn_late(*arguments: Any) -> Any:
        wait([arriving.future for arriving in prefetch._coming])
        return learn(*arguments)

    def learn_arriving_late(*arguments: Any) -> Any:
        wait([arriving.future for arriving in prefetch._coming])
        return learn_arriving(*arguments)

    if slow == "training":
        monkeypatch.setattr(learner, "learn", learn_late)
        monkeypatch.setattr(learner, "learn_arriving", learn_arriving_late)
    trainer.train()
    lines, ages = read_lines(trainer.run_path / "metrics.jsonl"), _ages(trainer.run_path)
    assert all(0 <= age <= 2 for step in ages for age in step)
    if slow == "training":
        assert [set(step) for step in ages] == [{0}, {1}, {2}, {2}, {2}, {2}]
    assert [r["staleness_most"] for r in lines] == [max(step) for step in ages]
    assert [r["step"] for r in lines] == list(range(1, 7))
    stream = PromptStream(trainer.run.data.train, seed=trainer.config.run.seed)
    for path in sorted((trainer.run_path / "rollouts").glob("*.parquet")):
        rows = pq.read_table(path).to_pylist()
        wanted = {p.problem.id for p in stream.take(trainer.config.train.prompts_per_step)}
        assert {row["problem_id"] for row in rows} == wanted


def test_the_first_groups_of_a_step_are_learnt_from_before_the_last_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The last group of each step but the first is there when others have been learnt from, and not before."""
    trainer = Trainer(embedded_config(tmp_path, *STALE, "train.steps=4", "train.eval_steps=0"))
    learner, rollouts, wanted = trainer.run.learner, trainer.run.rollouts, trainer.config.train.prompts_per_step
    assert learner.streams
    learnt = {step: threading.Event() for step in range(1, 5)}
    run, learn_groups, sizes = rollouts.run, learner._learn_groups, list[int]()

    def late(prompts: Any, settings: Any, tick: Any) -> Any:
        *first, last = run(prompts, settings, tick)
        yield from first
        if settings.step > 1:
            assert learnt[settings.step].wait(60), "the trainer waits for the whole step"
        yield last

    def told(mine: Any, *others: Any) -> Any:
        found = learn_groups(mine, *others)
        sizes.append(len(mine))
        learnt[trainer.state.step + 1].set()
        return found

    monkeypatch.setattr(rollouts, "run", late)
    monkeypatch.setattr(learner, "_learn_groups", told)
    trainer.train()
    lines = read_lines(trainer.run_path / "metrics.jsonl")
    assert [r["step"] for r in lines] == list(range(1, 5))
    assert sum(sizes) == 4 * wanted
    assert len(sizes) >= 1 + 3 * 2
    assert all(0 <= age <= 2 for step in _ages(trainer.run_path) for age in step)
    for path, line in zip(sorted((trainer.run_path / "rollouts").glob("*.parquet")), lines, strict=True):
        rows = pq.read_table(path).to_pylist()
        assert len({row["problem_id"] for row in rows}) == wanted
        assert line["reward"] == pytest.approx(sum(row["reward"] for row in rows) / len(rows))


def test_weights_are_taken_while_a_group_is_rewarded(tmp_path: Path):
    """Rollouts rest for new weights where whoever asked for groups is busy with the first one."""
    trainer = Trainer(embedded_config(tmp_path, *STALE))
    run, taken = trainer.run, threading.Event()
    settings = group_settings(run, trainer.state, 1)
    groups = roll_out(run, trainer.state.stream.take(3), settings, lambda: None, one_by_one=True)
    first = next(groups)

    def take() -> None:
        with run.rollouts.paused():
            taken.set()

    threading.Thread(target=take, daemon=True).start()
    assert taken.wait(30)
    assert len(first) == 1
    assert len(list(groups)) == 2


@pytest.mark.parametrize(("event", "nth"), [("progressed", 4), ("stepped", 2), ("evaluated", 3)])
def test_a_stopped_run_with_more_staleness_loses_no_step_and_no_prompt(tmp_path: Path, event: str, nth: int):
    with pytest.raises(RunStopped):
        Trainer(embedded_config(tmp_path, *STALE), listeners=[StopAt(event, nth)]).train()
    trainer = Trainer(embedded_config(tmp_path, *STALE), resume=True)
    trainer.train()
    assert [r["step"] for r in read_lines(trainer.run_path / "metrics.jsonl")] == list(range(1, 7))
    assert all(0 <= age <= 2 for step in _ages(trainer.run_path) for age in step)
    stream = PromptStream(trainer.run.data.train, seed=trainer.config.run.seed)
    for path in sorted((trainer.run_path / "rollouts").glob("*.parquet")):
        wanted = {p.problem.id for p in stream.take(trainer.config.train.prompts_per_step)}
        assert {row["problem_id"] for row in pq.read_table(path).to_pylist()} == wanted


def test_what_fails_beside_the_training_stops_the_run_with_its_words(tmp_path: Path):
    asked = []

    def broken(completions: list[str], **_: Any) -> list[float]:
        asked.append(len(completions))
        if len(asked) > 4:
            raise ZeroDivisionError("no luck today")
        return [0.0] * len(completions)

    with pytest.raises(UserError, match=r"rewards of this batch are missing.*no luck today"):
        Trainer(
            embedded_config(tmp_path, *STALE, "eval.limit=1", "train.eval_steps=0"), reward_functions=[broken]
        ).train()


def test_being_ahead_without_a_correction_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="choose how to correct for it"):
        embedded_config(tmp_path, "rollout.staleness=1")


def test_the_setting_that_had_another_name_is_read_as_ever(tmp_path: Path):
    correction = "train.importance_correction=token_truncate"
    assert embedded_config(tmp_path, "rollout.ahead=1", correction).rollout.staleness == 1
    assert embedded_config(tmp_path, "rollout.ahead=1", correction, "rollout.staleness=0").rollout.staleness == 0
