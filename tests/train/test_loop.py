"""Whole runs of the embedded model on the CPU: it learns, it can be stopped anywhere, and it goes on as if it had not."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from e3rl.config import Config, load_config
from e3rl.data.stream import PromptStream
from e3rl.errors import RunStopped, UserError
from e3rl.lab.pretrain import CONTEXT, build_model
from e3rl.lab.tokenizer import build_tokenizer
from e3rl.rollout.value import KEPT
from e3rl.train.collect import collect, roll_out
from e3rl.train.ledger import SCHEMA
from e3rl.train.listeners import Silent
from e3rl.train.metrics import METRICS
from e3rl.train.run_directory import read_lines
from e3rl.train.state import group_settings
from e3rl.train.trainer import Trainer
from tests.train.random_lab import lab_config

RECIPE = """
[data]
train = "lab:chain:1"
train_limit = 12
[rollout]
num_generations = 4
segment_length = 6
max_segments = 4
max_rows = 16
[erasure]
entropy_reference = "batch"
[rewards]
functions = ["lab"]
[train]
steps = 4
prompts_per_step = 3
learning_rate = 1e-4
save_steps = 2
eval_steps = 2
[eval]
limit = 4
num_samples = 2
"""


def _config(tmp_path: Path, *overrides: str) -> Config:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    return load_config(recipe, [], [f"run.output_dir={tmp_path}", *overrides])


def _timeless(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if not k.startswith(("seconds", "tokens_per", "memory", "train_seconds"))}


def _outcome(run: Path) -> dict[str, Any]:
    """Everything of a finished run that does not depend on the clock."""
    return {
        "weights": {k: v.tolist() for k, v in load_file(run / "model" / "model.safetensors").items()},
        "metrics": [_timeless(r) for r in read_lines(run / "metrics.jsonl")],
        "evaluations": read_lines(run / "evaluations.jsonl"),
        "rollouts": [pq.read_table(p).to_pylist() for p in sorted((run / "rollouts").glob("*.parquet"))],
        "summary": _timeless(json.loads((run / "summary.json").read_text())),
        "reference": json.loads((run / "model" / "e3rl_reference.json").read_text()),
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("finished")
    trainer = Trainer(_config(tmp_path))
    trainer.train()
    return trainer.run_path


def test_a_run_leaves_what_it_promises(finished: Path):
    assert {p.name for p in finished.iterdir()} == {
        "config.toml", "environment.json", "metrics.jsonl", "evaluations.jsonl", "rollouts", "checkpoints", "model",
        "summary.json",
    }  # fmt: skip
    metrics = read_lines(finished / "metrics.jsonl")
    assert [r["step"] for r in metrics] == [1, 2, 3, 4]
    explained = set(METRICS)
    for record in metrics:
        assert {k.partition("/")[0] for k in record} <= explained
        assert 0 <= record["accuracy"] <= 1
        assert record["mismatch_max"] < 1e-3
        assert record["tokens"] == record["committed_tokens"] + record["erased_tokens"]
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["before"]) == set(summary["after"]) == {"plain", "erasable"}
    assert {"avg@2", "pass@2", "ci95"} <= set(summary["before"]["plain"])
    assert summary["tokens_generated"] == sum(r["tokens"] for r in metrics)
    assert summary["r"] == sum(r["erased_tokens"] for r in metrics) / sum(r["committed_tokens"] for r in metrics)


def test_the_ledger_holds_every_trajectory_and_agrees_with_the_metrics(finished: Path):
    for record in read_lines(finished / "metrics.jsonl"):
        table = pq.read_table(finished / "rollouts" / f"step-{record['step']:06d}.parquet")
        assert table.schema.equals(SCHEMA)
        rows = table.to_pylist()
        assert len(rows) == 12
        assert sum(len(s["ids"]) for r in rows for s in r["segments"]) == record["committed_tokens"]
        assert sum(len(e["ids"]) for r in rows for e in r["erasures"]) == record["erased_tokens"]
        assert sum(r["reward"] for r in rows) / 12 == pytest.approx(record["reward"])
        for row in rows:
            assert "".join(s["text"] for s in row["segments"]) == row["response"]
            assert len(row["advantages"]) == sum(len(s["ids"]) for s in row["segments"])
            assert sum(row["shares"]) == pytest.approx(1, abs=1e-4)
            for erased in row["erasures"]:
                assert erased["uncertainty"] > erased["threshold"]


def test_d3_a_step_is_judged_by_the_token_entropies_of_the_step_before(finished: Path):
    """Eq 13. mu_E and sigma_E are those of the first candidates and committed segments of the previous batch."""
    before, after = (pq.read_table(finished / "rollouts" / f"step-00000{n}.parquet").to_pylist() for n in (1, 2))
    assert sum(len(row["erasures"]) for row in before) > 0
    entropies = [
        h
        for row in before
        for c in (*row["segments"], *(e for e in row["erasures"] if e["attempt"] == 0))
        for h in c["entropies"]
    ]
    mean, std = statistics.fmean(entropies), statistics.pstdev(entropies)
    judged = [c for row in after for c in (*row["segments"], *row["erasures"])]
    expected = [0.1 / (1 + math.exp(-(max(c["entropies"]) - mean) / (std + 1e-6))) for c in judged]
    assert [c["extremum"] for c in judged] == pytest.approx(expected, abs=1e-6)


def test_reference_statistics_are_of_all_first_candidates_of_the_run(finished: Path):
    rows = [
        row for path in sorted((finished / "rollouts").glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    by_index: dict[int, list[float]] = {}
    for c in (c for row in rows for c in (*row["segments"], *row["erasures"]) if c["attempt"] == 0):
        by_index.setdefault(c["index"], []).append(c["uncertainty"])
    found = json.loads((finished / "model" / "e3rl_reference.json").read_text())["segments"]
    assert [s["count"] for s in found] == [len(by_index[n]) for n in range(len(by_index))]
    assert [s["mean"] for s in found] == pytest.approx([statistics.fmean(by_index[n]) for n in range(len(by_index))])


def test_the_model_is_an_ordinary_directory(finished: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1:"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]
    card = (finished / "model" / "README.md").read_text()
    assert "E³RL" in card
    assert "| before | plain |" in card


class _StopAt(Silent):
    """Asks the run to stop, as Ctrl-C does, once it has heard the nth event of a kind."""

    def __init__(self, event: str, nth: int) -> None:
        self._event, self._left = event, nth

    def __getattribute__(self, name: str) -> Any:
        if name in ("stepped", "evaluated", "progressed") and name == object.__getattribute__(self, "_event"):
            return self._count
        return object.__getattribute__(self, name)

    def _count(self, *_: Any) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("event", "nth"), [("progressed", 1), ("progressed", 5), ("stepped", 1), ("evaluated", 1), ("evaluated", 3)]
)
def test_a_stopped_run_goes_on_to_the_very_same_end(finished: Path, tmp_path: Path, event: str, nth: int):
    with pytest.raises(RunStopped, match=r"stopped after step \d of 4.*--resume"):
        Trainer(_config(tmp_path), listeners=[_StopAt(event, nth)]).train()
    trainer = Trainer(_config(tmp_path), resume=True)
    summary = trainer.train()
    assert _outcome(trainer.run_path) == _outcome(finished)
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
        Trainer(lab_config(tmp_path, *settings), listeners=[_StopAt("stepped", 1)]).train()
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
        Trainer(lab_config(tmp_path, *settings), listeners=[_StopAt("stepped", 1)]).train()
    again = Trainer(lab_config(tmp_path, *settings), resume=True)
    again.train()
    ours, theirs = _outcome(again.run_path), _outcome(whole.run_path)
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
    _config(tmp_path)
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
    assert _outcome(tmp_path / "run") == _outcome(finished)


def test_a_run_stopped_before_its_first_checkpoint_begins_again(finished: Path, tmp_path: Path):
    config = _config(tmp_path)
    path = Trainer(config, listeners=[_StopAt("evaluated", 1)]).run_path
    with pytest.raises(RunStopped):
        Trainer(config, listeners=[_StopAt("evaluated", 1)], resume=True).train()
    shutil.rmtree(path / "checkpoints")
    trainer = Trainer(config, resume=True)
    trainer.train()
    assert _outcome(trainer.run_path) == _outcome(finished)


@pytest.mark.parametrize(("spare", "steps"), [(0, 2), (-1, 2), (1, 3)])
def test_a_token_budget_ends_the_run_with_the_step_that_reaches_it(
    finished: Path, tmp_path: Path, spare: int, steps: int
):
    budget = read_lines(finished / "metrics.jsonl")[1]["tokens_total"] + spare
    trainer = Trainer(_config(tmp_path, f"train.max_tokens={budget}", "eval.limit=1", "eval.erasable=false"))
    assert trainer.train()["steps"] == len(read_lines(trainer.run_path / "metrics.jsonl")) == steps


def test_a_reward_function_that_always_fails_stops_the_run_with_its_words(tmp_path: Path):
    def broken(completions: list[str], **_: Any) -> list[float]:
        if len(completions) > 2:  # more than are tried before the run
            raise ZeroDivisionError("no luck today")
        return [0.0] * len(completions)

    with pytest.raises(UserError, match=r"all 12 rewards of this batch are missing.*broken.*no luck today"):
        Trainer(_config(tmp_path, "eval.limit=1", "eval.erasable=false"), reward_functions=[broken]).train()


def test_learning_raises_the_reward_on_what_it_trains_on(tmp_path: Path):
    def short(completions: list[str], **_: Any) -> list[float]:
        return [-float(len(c)) for c in completions]

    config = _config(
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


AHEAD = ("rollout.staleness=1", "train.importance_correction=token_truncate")


@pytest.fixture(scope="module")
def finished_ahead(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("ahead")
    trainer = Trainer(_config(tmp_path, *AHEAD))
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
        Trainer(_config(tmp_path, *AHEAD), listeners=[_StopAt(event, nth)]).train()
    trainer = Trainer(_config(tmp_path, *AHEAD), resume=True)
    trainer.train()
    assert _outcome(trainer.run_path) == _outcome(finished_ahead)


def test_a_run_that_is_ahead_keeps_tokens_that_the_tokenizer_has_no_name_for(tmp_path: Path):
    """A model with more rows than its tokenizer has tokens, as most have, may draw one of those."""
    torch.manual_seed(0)
    tokenizer, padded = build_tokenizer(CONTEXT), tmp_path / "padded"
    model = build_model(tokenizer)
    model.resize_token_embeddings(len(tokenizer) + 64, mean_resizing=False)
    model.save_pretrained(padded)
    tokenizer.save_pretrained(padded)
    config = _config(tmp_path, *AHEAD, f"model.path={padded}", "eval.limit=1", "train.steps=2")
    with pytest.raises(RunStopped):
        Trainer(config, listeners=[_StopAt("stepped", 1)]).train()
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
    trainer = Trainer(_config(tmp_path, *STALE))
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
    trainer = Trainer(_config(tmp_path, *STALE, "train.steps=4", "train.eval_steps=0"))
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
    trainer = Trainer(_config(tmp_path, *STALE))
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
        Trainer(_config(tmp_path, *STALE), listeners=[_StopAt(event, nth)]).train()
    trainer = Trainer(_config(tmp_path, *STALE), resume=True)
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
        Trainer(_config(tmp_path, *STALE, "eval.limit=1", "train.eval_steps=0"), reward_functions=[broken]).train()


def test_being_ahead_without_a_correction_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="choose how to correct for it"):
        _config(tmp_path, "rollout.staleness=1")


def test_the_setting_that_had_another_name_is_read_as_ever(tmp_path: Path):
    correction = "train.importance_correction=token_truncate"
    assert _config(tmp_path, "rollout.ahead=1", correction).rollout.staleness == 1
    assert _config(tmp_path, "rollout.ahead=1", correction, "rollout.staleness=0").rollout.staleness == 0
