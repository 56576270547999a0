"""SFT learns the data's solutions, vanilla learns nothing, and a filter changes what is trained on and nothing else."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from e3rl.config import Config
from e3rl.errors import RunStopped, UserError
from e3rl.models import load_policy
from e3rl.report.display import LiveDisplay
from e3rl.train.listeners import Silent
from e3rl.train.metrics import METRICS
from e3rl.train.packing import trajectory_sequence
from e3rl.train.prompts import demonstration, solution
from e3rl.train.run_directory import read_lines
from e3rl.train.scoring import score_sequences
from e3rl.train.trainer import Trainer
from e3rl.types import Problem, Prompt
from tests.train.random_lab import lab_config


def solution_logprob(trainer: Trainer) -> float:
    """Mean log-probability of the training problems' solutions, computed outside the trainer's own path."""
    groups = [demonstration(p, trainer.policy, trainer.config).group for p in trainer.run.data.train]
    sequences = [trajectory_sequence(g.trajectories[0], i) for i, g in enumerate(groups)]
    scores = score_sequences(trainer.policy.model, sequences, temperature=1.0, token_budget=4096)
    return float(torch.cat([s.logprobs_T for s in scores]).mean())


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "weights.safetensors")


def test_sft_raises_the_probability_of_solutions_and_rolls_nothing_out(tmp_path: Path):
    config = lab_config(tmp_path, "objective.name=sft", "train.steps=12", "train.prompts_per_step=8")
    display = LiveDisplay(Console(file=io.StringIO(), force_terminal=True))
    trainer = Trainer(config, listeners=[display])
    before = solution_logprob(trainer)
    try:
        assert trainer.train()["method"] == "SFT"
    finally:
        display.close()
    assert solution_logprob(trainer) > before + 1.0
    records = read_lines(trainer.run_path / "metrics.jsonl")
    assert [r["tokens"] for r in records] == [0] * 12
    assert records[0]["loss"] == pytest.approx(-before, abs=0.05)
    assert (records[0]["reward"], records[0]["reward_missing"], records[0]["mismatch_mean"]) == (None, 0, None)
    assert {k.partition("/")[0] for r in records for k in r} <= set(METRICS)
    rows = pq.read_table(trainer.run_path / "rollouts" / "step-000001.parquet").to_pylist()
    by_id = {p.problem.id: p.problem for p in trainer.run.data.train}
    assert len(rows) == 8
    for row in rows:
        assert row["response"] == by_id[row["problem_id"]].columns["solution"] + trainer.policy.tokenizer.eos_token
        assert (row["policy_version"], row["reward"], row["advantages"][0]) == (None, None, 1.0)


def test_a_solution_is_taken_from_the_named_column():
    config = Config()
    problem = Problem("p", "1+1", "2", {"solution": "1+1=2", "nested": {"proof": "two"}})

    def named(column: str) -> Config:
        return dataclasses.replace(config, data=dataclasses.replace(config.data, solution_column=column))

    assert solution(problem, config) == "1+1=2"
    assert solution(problem, named("nested.proof")) == "two"
    assert solution(problem, named("answer")) == "2"
    with pytest.raises(UserError, match=r"problem 'p' has no solution.*'proof' \(data.solution_column\).*nested"):
        solution(problem, named("proof"))


def test_a_solution_that_does_not_fit_is_refused(tmp_path: Path):
    config = lab_config(tmp_path, "objective.name=sft")
    policy = load_policy(config.model)
    prompt = Prompt(Problem("long", "1+1", "2", {"solution": "1" * policy.context_length}), (2, 3))
    with pytest.raises(UserError, match=r"problem 'long': prompt and solution have 515 tokens.*context holds 512"):
        demonstration(prompt, policy, config)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.solution_column=proof", "has no solution to learn from.*column 'proof'"),
        ("filter.name=nonzero_spread", "filter.name = 'nonzero_spread' is about rollouts"),
        ("train.max_tokens=1000", "train.max_tokens counts generated tokens, and objective 'sft' generates none"),
        ("train.importance_correction=token_mask", "train.importance_correction = 'token_mask' is about rollouts"),
    ],
)
def test_what_demonstrations_cannot_do_is_refused_before_training(tmp_path: Path, override: str, words: str):
    with pytest.raises(UserError, match=words):
        Trainer(lab_config(tmp_path, "objective.name=sft", override))
    assert not (tmp_path / "run").exists()


def test_vanilla_changes_no_weight_whatever_the_optimizer_is_told(tmp_path: Path):
    config = lab_config(
        tmp_path, "objective.name=vanilla", "train.weight_decay=0.5", "train.save_steps=1", "train.save_total_limit=0"
    )
    trainer = Trainer(config)
    trainer.train()
    before, after = weights(trainer.run_path, 0), weights(trainer.run_path, 2)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [r["tokens"] > 0 for r in read_lines(trainer.run_path / "metrics.jsonl")] == [True, True]


def even(completions: list[Any], **_: Any) -> list[float]:
    """Half of all groups of two have unequal rewards."""
    return [float(sum(map(ord, c if isinstance(c, str) else c[0]["content"])) % 2) for c in completions]


FILTERED = ("filter.name=nonzero_spread", "rollout.erase=false", "eval.erasable=false", "train.steps=3",
            "data.train_limit=24")  # fmt: skip


class Notes(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def noted(self, text: str) -> None:
        self.texts.append(text)


class StopInRefill(Silent):
    """Asks the run to stop, as Ctrl-C does, when a refill of the second step delivers its first group."""

    def __init__(self) -> None:
        self._rounds = 0

    def progressed(self, activity: str, done: int, of: int) -> None:
        self._rounds += done == 1
        if self._rounds == 4:
            self._rounds += 1
            os.kill(os.getpid(), signal.SIGINT)


def run(tmp_path: Path, *listeners: Silent, overrides: tuple[str, ...] = FILTERED, resume: bool = False) -> Trainer:
    config = lab_config(tmp_path, *overrides)
    trainer = Trainer(config, reward_functions=[even], listeners=listeners, resume=resume)
    trainer.train()
    return trainer


@pytest.mark.parametrize("objective", ["grpo", "e3rl"])
def test_a_filtered_step_trains_on_full_batches_and_says_what_that_cost(tmp_path: Path, objective: str):
    trainer = run(tmp_path, overrides=(*FILTERED, f"objective.name={objective}"))
    records = read_lines(trainer.run_path / "metrics.jsonl")
    assert sum(r["refills"] for r in records) > 0
    total = 0
    for record in records:
        rows = pq.read_table(trainer.run_path / "rollouts" / f"step-{record['step']:06d}.parquet").to_pylist()
        total += record["tokens"]
        tokens = {row["problem_id"]: 0 for row in rows}
        used = {row["problem_id"]: bool(row["advantages"]) for row in rows}
        for row in rows:
            tokens[row["problem_id"]] += sum(len(s["ids"]) for s in row["segments"])
        assert record["groups_kept"] == sum(used.values()) == 2
        assert record["dropped_tokens"] == sum(n for name, n in tokens.items() if not used[name])
        assert (record["tokens"], record["tokens_total"]) == (sum(tokens.values()), total)
        assert record["degenerate_groups"] == pytest.approx(1 - 2 / len(tokens))


def test_a_filter_that_keeps_too_few_says_so_and_goes_on(tmp_path: Path):
    notes = Notes()
    overrides = (*FILTERED, "filter.name=mixed_accuracy", "filter.max_refills=1", "rewards.functions=['lab']")
    trainer = Trainer(lab_config(tmp_path, *overrides), listeners=[notes])
    trainer.train()
    assert notes.texts[0] == "step 1 trains on 0 of 2 groups: filter 'mixed_accuracy' dropped 4, after 1 refills"
    records = read_lines(trainer.run_path / "metrics.jsonl")
    assert [(r["groups_kept"], r["refills"], r["grad_norm"]) for r in records] == [(0, 1, 0.0)] * 3
    before, after = weights(trainer.run_path, 0), weights(trainer.run_path, 3)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_refill_without_a_reward_does_not_end_the_run(tmp_path: Path):
    """It may be a single group: what would be no reason to stop in a step is none in its last part."""

    calls: list[int] = []

    def alike_then_broken(completions: list[str], **columns: object) -> list[float]:
        calls.append(len(completions))
        if len(calls) > 1 and len(completions) == 2:  # after the check before the run: a refill for one of two groups
            raise ConnectionError("gone")
        return [0.0, 1.0] + [0.5] * (len(completions) - 2)

    config = lab_config(tmp_path, *FILTERED, "filter.max_refills=1")
    trainer = Trainer(config, reward_functions=[alike_then_broken])
    trainer.train()
    found = [
        (r["groups_kept"], r["refills"], r["reward_missing"]) for r in read_lines(trainer.run_path / "metrics.jsonl")
    ]
    assert found == [(1, 1, 2)] * len(found)


def test_a_run_stopped_in_a_refill_goes_on_to_the_same_end(tmp_path: Path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    expected = run(whole)
    with pytest.raises(RunStopped):
        run(stopped, StopInRefill())
    assert len(read_lines(stopped / "run" / "metrics.jsonl")) < 3
    found = run(stopped, resume=True)
    same = weights(found.run_path, 3)
    assert all(torch.equal(value, same[name]) for name, value in weights(expected.run_path, 3).items())
    keys = ("refills", "groups_kept", "dropped_tokens", "tokens_total", "reward", "loss", "epoch")
    lines = [[{k: r[k] for k in keys} for r in read_lines(t.run_path / "metrics.jsonl")] for t in (expected, found)]
    assert lines[0] == lines[1]
