"""Whole runs of the embedded model on the CPU: it learns, it can be stopped anywhere, and it goes on as if it had not."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from e3rl.data.stream import PromptStream
from e3rl.errors import RunStopped, UserError
from e3rl.rollout.value import KEPT
from e3rl.train.collect import collect
from e3rl.train.run_directory import read_lines
from e3rl.train.state import group_settings
from e3rl.train.trainer import Trainer
from tests.train.embedded import StopAt, embedded_config, outcome
from tests.train.random_lab import lab_config


@pytest.mark.parametrize(
    ("event", "nth"), [("progressed", 1), ("progressed", 5), ("stepped", 1), ("evaluated", 1), ("evaluated", 3)]
)
def test_a_stopped_run_goes_on_to_the_very_same_end(finished: Path, tmp_path: Path, event: str, nth: int):
    with pytest.raises(RunStopped, match=r"stopped after step \d of 4.*--resume"):
        Trainer(embedded_config(tmp_path), listeners=[StopAt(event, nth)]).train()
    trainer = Trainer(embedded_config(tmp_path), resume=True)
    summary = trainer.train()
    assert outcome(trainer.run_path) == outcome(finished)
    lines = read_lines(trainer.run_path / "metrics.jsonl")
    seconds = sum(r["seconds_rollout"] + r["seconds_reward"] + r["seconds_train"] for r in lines)
    assert summary["train_seconds"] == pytest.approx(seconds), "of both parts of the run"


def test_dropout_goes_on_where_it_stopped(tmp_path: Path):
    """What is dropped is drawn from PyTorch's own random numbers, which a checkpoint keeps."""
    settings = (
        *("model.lora_r=2", "model.lora_dropout=0.5", "objective.kl_coef=0", "train.save_steps=1"),
        'rewards.functions=["tests.ranks.run:evenness"]',
    )
    (tmp_path / "whole").mkdir()
    whole = Trainer(lab_config(tmp_path / "whole", *settings))
    whole.train()
    assert min(r["grad_norm"] for r in read_lines(whole.run_path / "metrics.jsonl")) > 0
    with pytest.raises(RunStopped):
        Trainer(lab_config(tmp_path, *settings), listeners=[StopAt("stepped", 1)]).train()
    torch.manual_seed(5)
    again = Trainer(lab_config(tmp_path, *settings), resume=True)
    again.train()
    ours, theirs = (load_file(t.run_path / "model" / "model.safetensors") for t in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_critic_goes_on_where_it_stopped(tmp_path: Path):
    """It judges from the second step on by what the first one's rewards taught it, and a checkpoint keeps every bit of it."""
    settings = (
        *(
            "erasure.metric=value",
            "erasure.baseline=quantile",
            "objective.kl_coef=0",
            "train.save_steps=1",
            "train.steps=3",
        ),
        *("erasure.commit_anyway=0.3", "train.selection_cap=4", "erasure.quantile=0.3"),
        *("rollout.num_generations=4", "erasure.rho=0", 'rewards.functions=["tests.ranks.run:evenness"]'),
    )
    (tmp_path / "whole").mkdir()
    whole = Trainer(lab_config(tmp_path / "whole", *settings))
    whole.train()
    with pytest.raises(RunStopped):
        Trainer(lab_config(tmp_path, *settings), listeners=[StopAt("stepped", 1)]).train()
    again = Trainer(lab_config(tmp_path, *settings), resume=True)
    again.train()
    ours, theirs = outcome(again.run_path), outcome(whole.run_path)
    assert ours == theirs
    head = theirs["reference"]["head"]
    assert head["version"] == 3
    assert head["responses"] == pytest.approx(8 * (1 + KEPT + KEPT**2))
    first, *later = theirs["rollouts"]
    assert {s["verdict"] for rows in theirs["rollouts"] for row in rows for s in row["segments"]} >= {
        "spared",
        "commit",
    }
    assert all(line["importance_weight"] != 1 for line in theirs["metrics"])
    prior = [abs(_entropy_and_eps(s) - s["uncertainty"]) for row in first for s in row["segments"]]
    learnt = [abs(_entropy_and_eps(s) - s["uncertainty"]) for rows in later for row in rows for s in row["segments"]]
    assert max(prior) < 1e-9 < 0.01 < max(learnt)
    onward = [f"model.path={whole.run_path / 'model'}", *settings]
    (tmp_path / "onward").mkdir()
    assert Trainer(lab_config(tmp_path / "onward", *onward)).state.calibration.head == whole.state.calibration.head


def _entropy_and_eps(segment: Mapping[str, Any]) -> float:
    return statistics.fmean(segment["entropies"]) + 0.3 * statistics.fmean(segment["perturbations"])


def test_a_prompt_that_comes_again_is_answered_anew(tmp_path: Path):
    """Two epochs over the same two prompts, by weights that hardly move: the step is part of every draw's name."""
    trainer = Trainer(lab_config(tmp_path, "data.train_limit=2", "train.learning_rate=1e-12"))
    trainer.train()
    first, second = (pq.read_table(p).to_pylist() for p in sorted((trainer.run_path / "rollouts").glob("*.parquet")))
    responses = [{(r["problem_id"], r["sibling"]): r["segments"][0]["ids"] for r in rows} for rows in (first, second)]
    assert responses[0].keys() == responses[1].keys()
    assert all(responses[0][key] != responses[1][key] for key in responses[0])


def test_updates_are_counted_through_all_steps(tmp_path: Path):
    """Two updates a step: the fourth of four has the full rate, and the second step's rollouts are two updates old."""
    settings = ("train.minibatches=2", "train.warmup_ratio=1.0", "train.learning_rate=4e-4")
    trainer = Trainer(lab_config(tmp_path, *settings))
    trainer.train()
    assert [r["learning_rate"] for r in read_lines(trainer.run_path / "metrics.jsonl")] == pytest.approx([2e-4, 4e-4])
    ledgers = [pq.read_table(p).to_pylist() for p in sorted((trainer.run_path / "rollouts").glob("*.parquet"))]
    assert [{row["policy_version"] for row in rows} for rows in ledgers] == [{0}, {2}]


def test_groups_are_learnt_in_the_order_of_their_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = Trainer(lab_config(tmp_path, "train.prompts_per_step=4"))
    run, state = trainer.run, trainer.state
    with run.scorer:
        roll_out = run.rollouts.run
        monkeypatch.setattr(run.rollouts, "run", lambda *a, **kw: reversed(list(roll_out(*a, **kw))))
        expected = PromptStream(run.data.train, seed=trainer.config.run.seed).take(4)
        kept = collect(run, state.stream, group_settings(run, state, 1), lambda: None).kept
    assert [item.group.prompt.problem.id for item in kept] == [p.problem.id for p in expected]
    run.directory.release()


def test_a_killed_run_goes_on_to_the_very_same_end(finished: Path, tmp_path: Path):
    embedded_config(tmp_path)
    command = [sys.executable, "-m", "e3rl", "train", str(tmp_path / "recipe.toml"), f"run.output_dir={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 120
    while len(read_lines(tmp_path / "run" / "metrics.jsonl")) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (tmp_path / "run" / "summary.json").exists()
    subprocess.run([*command, "--resume"], check=True, env=environment, stdout=subprocess.DEVNULL)
    assert outcome(tmp_path / "run") == outcome(finished)


def test_a_run_stopped_before_its_first_checkpoint_begins_again(finished: Path, tmp_path: Path):
    config = embedded_config(tmp_path)
    path = Trainer(config, listeners=[StopAt("evaluated", 1)]).run_path
    with pytest.raises(RunStopped):
        Trainer(config, listeners=[StopAt("evaluated", 1)], resume=True).train()
    shutil.rmtree(path / "checkpoints")
    trainer = Trainer(config, resume=True)
    trainer.train()
    assert outcome(trainer.run_path) == outcome(finished)


@pytest.mark.parametrize(("spare", "steps"), [(0, 2), (-1, 2), (1, 3)])
def test_a_token_budget_ends_the_run_with_the_step_that_reaches_it(
    finished: Path, tmp_path: Path, spare: int, steps: int
):
    budget = read_lines(finished / "metrics.jsonl")[1]["tokens_total"] + spare
    trainer = Trainer(embedded_config(tmp_path, f"train.max_tokens={budget}", "eval.limit=1", "eval.erasable=false"))
    assert trainer.train()["steps"] == len(read_lines(trainer.run_path / "metrics.jsonl")) == steps


def test_a_reward_function_that_always_fails_stops_the_run_with_its_words(tmp_path: Path):
    def broken(completions: list[str], **_: Any) -> list[float]:
        if len(completions) > 2:  # more than are tried before the run
            raise ZeroDivisionError("no luck today")
        return [0.0] * len(completions)

    with pytest.raises(UserError, match=r"all 12 rewards of this batch are missing.*broken.*no luck today"):
        Trainer(embedded_config(tmp_path, "eval.limit=1", "eval.erasable=false"), reward_functions=[broken]).train()


def test_learning_raises_the_reward_on_what_it_trains_on(tmp_path: Path):
    def short(completions: list[str], **_: Any) -> list[float]:
        return [-float(len(c)) for c in completions]

    config = embedded_config(
        tmp_path,
        "train.steps=8",
        "train.prompts_per_step=4",
        "train.learning_rate=1e-3",
        "rollout.temperature=2.0",
        "train.eval_steps=0",
        "eval.erasable=false",
    )
    torch.manual_seed(0)
    trainer = Trainer(config, reward_functions=[short])
    trainer.train()
    rewards = [r["reward"] for r in read_lines(trainer.run_path / "metrics.jsonl")]
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 2
