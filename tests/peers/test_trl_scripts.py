"""Six scripts, each run for two updates in TRL and, converted, here: the same settings and the same first batch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is not installed here; `make test-peers` installs it in its own environment")

import inspect

from trl import GRPOTrainer, RLOOTrainer

from e3rl.cli import main
from e3rl.config import load_config
from e3rl.integrations import trl_scripts
from e3rl.train.run_directory import read_lines
from e3rl.train.trainer import Trainer
from tests.integrations.fixtures import NAMES, lay_out

RUNNER = Path(__file__).with_name("run_script.py")


def in_trl(directory: Path, name: str) -> dict[str, Any]:
    command = [sys.executable, str(RUNNER), f"{name}.py", "found.json"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((directory / "found.json").read_text())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_script_is_the_same_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory = lay_out(tmp_path / "scripts")
    trl = in_trl(directory, name)
    monkeypatch.chdir(directory)
    monkeypatch.syspath_prepend(str(directory))
    converted = ["convert", "trl", "--output", "recipe.toml", f"{name}.py", "--", "--max_steps", "2", "--bf16", "False"]
    assert main(converted) == 0
    config = load_config(Path("recipe.toml"), overrides=["run.name=ours", "train.save_steps=0", "model.device=cpu"])
    trainer = Trainer(config)
    policy, learner = trainer.policy, trainer.run.learner
    ours = {
        "learning_rate": config.train.learning_rate, "weight_decay": config.train.weight_decay,
        "adam_beta1": config.train.adam_beta1, "adam_beta2": config.train.adam_beta2,
        "max_grad_norm": config.train.max_grad_norm, "seed": config.run.seed,
        "num_iterations": config.train.num_iterations, "temperature": config.rollout.temperature,
        "top_p": config.rollout.top_p, "num_generations": config.rollout.num_generations,
        "max_completion_length": config.rollout.completion_limit, "beta": config.objective.options["kl_coef"],
    }  # fmt: skip
    assert ours == trl["settings"]
    assert config.rollout.top_k == trl["top_k"]
    options = config.objective.options
    assert (options["clip_low"], options["clip_high"]) == (trl["epsilon_low"], trl["epsilon_high"])
    assert learner.updates_per_step() == trl["updates_a_rollout"]
    assert sum(p.numel() for _, p in policy.trainable()) == trl["trainable"]
    names = {n.split(".lora_A")[0].rpartition(".")[2] for n, _ in policy.trainable() if ".lora_A" in n}
    assert sorted(names) == trl["adapted"]
    scaling = [m.scaling["default"] for m in policy.model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    assert (scaling[0] if scaling else None) == trl["scaling"]
    batch, rendered = Counter(map(tuple, trl["first_batch"])), {p.ids for p in trainer.run.data.train}
    assert sorted(batch.values()) == [config.rollout.num_generations] * config.train.prompts_per_step
    assert set(batch) <= rendered  # the order of prompts is each library's own
    if config.train.prompts_per_step == len(rendered):
        assert first_batch(trainer) == batch
    trainer.train()
    rates = [record["learning_rate"] for record in read_lines(trainer.run_path / "metrics.jsonl")]
    # a step's record has the rate of its last update, TRL's log the rate that follows an update
    if learner.updates_per_step() == 1:
        assert rates == pytest.approx(trl["rates"], rel=1e-6)


def first_batch(trainer: Trainer) -> Counter[tuple[int, ...]]:
    """Prompts of the first step, each as often as it is sampled. The stream is put back."""
    stream, config = trainer.state.stream, trainer.config
    position = stream.state()
    prompts = stream.take(config.train.prompts_per_step)
    stream.restore(position)
    return Counter({p.ids: config.rollout.num_generations for p in prompts})


def test_the_trainer_s_parameters_are_those_of_trl():
    """Positional arguments are read by their places."""
    parameters = list(inspect.signature(GRPOTrainer.__init__).parameters)[1:]
    assert tuple(parameters) == trl_scripts.TRAINER
    others = list(inspect.signature(RLOOTrainer.__init__).parameters)[1:]
    assert tuple(others) == trl_scripts.TRAINER[: len(others)]
