"""A rehearsal changes sizes and nothing else, and runs the recipe's own commands from training to the exported model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from e3rl.cli import main
from e3rl.cli.recipes import find_recipe
from e3rl.config import Config, build_config, lay, load_config, to_tables
from e3rl.errors import UserError
from e3rl.rehearse import rehearsal, standins
from e3rl.rehearse.rehearsal import changed, shrink
from e3rl.train.run_directory import read_lines
from e3rl.train.trainer import Trainer

PAPER = ("qwen3-4b", "qwen3-8b", "erpo-qwen2.5-1.5b", "erpo-qwen2.5-3b", "erpo-qwen2.5-7b")
METHODS = ("e3rl", "grpo", "dapo", "gspo", "sapo", "erpo", "sft", "vanilla")
OURS = {
    "methods/step-credit": "uncertainty",
    "objective.credit_weight=0.5 objective.credit_groups=mixed": "uncertainty",
    "objective.allocation=value erasure.metric=value": "uncertainty",
    "train.selection_cap=4 erasure.commit_anyway=0.2": "importance_weight",
    "objective.name=vespo objective.kl_coef=0.04": "gamma_weight",
    "objective.name=luspo objective.kl_coef=0.04": "clip_fraction",
    "objective.name=rloo objective.kl_coef=0.04": "clip_fraction",
}
"""Settings that the papers' recipes don't have, and a metric that each has."""


def _recipe(name: str, *overlays: str, overrides: Sequence[str] = ()) -> Config:
    return load_config(find_recipe(name), [find_recipe(o) for o in overlays], overrides)


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("method", METHODS)
def test_only_sizes_change(name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(standins, "make_model", lambda config, directory: {})
    config = _recipe(name, f"methods/{method}")
    small, _, _ = shrink(config, tmp_path)
    assert set(changed(config, small)) <= set(rehearsal._SIZES)
    assert small.eval.num_samples == config.eval.num_samples


@pytest.mark.parametrize("settings", OURS)
def test_a_step_of_the_paper_s_recipe_with_settings_of_ours(settings: str, tmp_path: Path):
    """The rehearsal's first step in this process, of fewer prompts: both minibatches move weights, by finite numbers."""
    given = settings.split()
    config = _recipe("qwen3-4b", *(s for s in given if "=" not in s), overrides=[s for s in given if "=" in s])
    small, _, _ = shrink(config, tmp_path)
    assert set(changed(config, small)) <= set(rehearsal._SIZES)
    less = {"train": {"steps": 1, "prompts_per_step": 2, "eval_steps": 0}, "data": {"eval": []}}
    trainer = Trainer(build_config(lay(to_tables(small), less)))
    trainer.train()
    [line] = read_lines(trainer.run_path / "metrics.jsonl")
    assert 0 < line["grad_norm"] < float("inf")
    assert line[OURS[settings]] != 1
    assert (line["r"] > 0) == config.may_erase


@pytest.mark.parametrize("name", ["one-h200", "8xh100", "32xh100"])
def test_topologies_keep_their_processes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fewer of a kind, none less: what generates apart and what trains together still does, without GPUs."""
    monkeypatch.setattr(standins, "make_model", lambda config, directory: {})
    config = _recipe("qwen3-4b", f"topologies/{name}")
    small, _, _ = shrink(config, tmp_path)
    assert set(changed(config, small)) <= set(rehearsal._SIZES)
    assert (small.rollout.workers > 0, small.train.workers > 0) == (
        config.rollout.workers > 0,
        config.train.workers > 0,
    )
    assert small.rollout.workers <= 1
    assert small.train.workers <= rehearsal.RANKS
    assert small.rollout.worker_gpus == small.train.worker_gpus == 0


def test_what_a_topology_needs_and_is_not_installed_is_said_first(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(rehearsal, "find_spec", lambda name: None)
    assert main(["rehearse", "qwen3-4b", "--overlay", "topologies/32xh100"]) == 2
    assert "need vllm, ray, deepspeed: pip install 'e3rl[vllm,ray,deepspeed]'" in capsys.readouterr().err


def test_a_benchmark_that_was_not_evaluated_is_noticed(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    line = '{"step": %d, "loss": 0.0, "grad_norm": 0.0, "r": 0.0}\n'
    (run / "metrics.jsonl").write_text("".join(line % n for n in (1, 2, 3)))
    (run / "evaluations.jsonl").write_text('{"step": 3, "data": "amc23", "avg@32": 0.0}\n')
    with pytest.raises(UserError, match=r"aime24, .* not evaluated at k = 32"):
        rehearsal.trained(_recipe("qwen3-4b"), run)


def test_real_data_are_taken_where_they_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A few rows of a file, or of a hub that answers; without one stand-ins of the same columns."""
    monkeypatch.setattr(standins, "make_model", lambda config, directory: {})
    asked: list[str] = []

    def load(source: str, **_: object) -> list[str]:
        asked.append(source)
        return ["a problem"]

    monkeypatch.setattr(standins, "load_problems", load)
    monkeypatch.setattr(
        standins, "load_benchmark", lambda name, directory: SimpleNamespace(problems=[asked.append(name)])
    )
    found = {}
    for answers in (False, True):
        monkeypatch.setattr(standins, "hub_silent", lambda answers=answers: "" if answers else "it is away")
        small, _, notes = shrink(_recipe("qwen3-4b"), tmp_path)
        found[answers] = small.data, " ".join(notes)
    stand_ins, said = found[False]
    assert stand_ins.train == str(tmp_path / "problems.jsonl")
    assert stand_ins.directory == str(tmp_path / "benchmarks")
    assert "sums under the columns of zwhe99/DeepMath-103K" in said
    row = json.loads((tmp_path / "problems.jsonl").read_text().splitlines()[0])
    assert {"question", "final_answer"} <= set(row)
    real, said = found[True]
    assert (real.train, real.train_limit, real.directory) == ("zwhe99/DeepMath-103K", rehearsal.ROWS, "")
    assert "the first 64 rows of zwhe99/DeepMath-103K" in said
    assert "benchmarks: the real ones" in said
    assert asked == ["zwhe99/DeepMath-103K", *_recipe("qwen3-4b").data.eval]


@pytest.mark.parametrize("name", sorted(["Qwen/Qwen3-8B", "Qwen/Qwen2.5-7B"]))
def test_the_architecture_stays(name: str):
    """Type, tied weights, biases and the ratio of heads are the real model's."""
    config = _recipe("qwen3-4b")
    real = standins.architecture(load_config(overrides=[f"model.path={name}"]).model)
    small = standins.shrunk(real)
    assert small["tie_word_embeddings"] is real["tie_word_embeddings"] is False
    ratio = real["num_attention_heads"] // real["num_key_value_heads"]
    assert small["num_attention_heads"] // small["num_key_value_heads"] == min(ratio, standins.HEADS)
    assert {k for k in real if real[k] != small[k]} <= {
        *(
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ),
        *("vocab_size", "max_window_layers", "bos_token_id", "eos_token_id"),
    }
    assert config.model.path == "Qwen/Qwen3-4B"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("Qwen/Qwen3-4B", 4_022_468_096), ("Qwen/Qwen3-8B", 8_190_735_360), ("Qwen/Qwen2.5-3B", 3_085_938_688)],
)
def test_the_shipped_configs_are_those_of_the_real_models(name: str, parameters: int):
    """By the parameters that the published weights have."""
    real = dict(standins.architecture(load_config(overrides=[f"model.path={name}"]).model))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(real.pop("model_type"), **real))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_from_the_command_to_the_exported_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Trained, killed, resumed, evaluated, exported and loaded, by the commands of the user."""
    assert main(["rehearse", "qwen3-4b", "--directory", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for outcome in ("killed (SIGKILL) after step 2", "train, resumed", "export, loaded by transformers"):
        assert outcome in shown
    assert "rollout.segment_length" in shown
    assert "last step: loss" in shown
    assert "eval at k = 256" in shown
