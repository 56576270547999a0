"""Every example runs as its docstring says: by itself, through its contract suite, and in a training run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from e3rl.engine.recompute import RecomputeEngine
from e3rl.plugins import load
from e3rl.testing.engine import ENGINE_CHECKS
from e3rl.testing.scripts import EngineContract
from e3rl.train.run_directory import read_lines
from e3rl.train.trainer import Trainer
from e3rl.types import Problem, Prompt
from tests.engine.models import EOS, VOCAB, tiny
from tests.train.random_lab import lab_config

EXAMPLES = Path(__file__).parents[2] / "examples"
KINDS = ("objective", "metric", "reward", "engine")
PLUG_INS = sorted(p for kind in KINDS for p in EXAMPLES.glob(f"{kind}_*.py"))


def example(name: str, attribute: str) -> Any:
    return load("example", f"{EXAMPLES / name}:{attribute}", {})


def test_there_is_one_of_each_kind():
    assert {p.name.partition("_")[0] for p in PLUG_INS} == set(KINDS)


@pytest.mark.parametrize("path", PLUG_INS, ids=lambda p: p.name)
def test_an_example_is_short_and_says_how_to_run_it(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert f"examples/{path.name}:" in text.split('"""')[1]


@pytest.mark.parametrize("path", [p for p in PLUG_INS if "__main__" in p.read_text()], ids=lambda p: p.name)
def test_an_example_that_checks_itself_keeps_its_contract(path: Path, capsys: pytest.CaptureFixture[str]):
    runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    assert said
    assert all(re.search(r"keeps the contract of an? \w+", line) for line in said)


@pytest.mark.parametrize("architecture", ["Qwen3", "Mistral"])
@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=lambda c: c.__name__)
def test_the_engine_keeps_the_whole_contract(architecture: str, check: Any):
    kind, model = example("engine_dynamic_cache.py", "DynamicCacheEngine"), tiny(architecture)
    settings: dict[str, Any] = {"eos_ids": EOS, "max_rows": 3, "cache_rows": 6, "max_length": 48}
    check(
        EngineContract(
            lambda: kind(model, **settings), lambda: RecomputeEngine(model, **settings), VOCAB, EOS, scripts=4
        )
    )


def test_the_metric_is_the_largest_perturbation():
    from e3rl.config import ErasureConfig
    from e3rl.rollout.moments import Moments
    from e3rl.types import Candidate

    candidate = Candidate((2, 3, 4), (-1.0,) * 3, (0.5,) * 3, (0.2, 1.7, 0.0), (1.0,) * 3, (1,) * 3, False)
    u = example("metric_max_perturbation.py", "max_perturbation")(candidate, (), Moments(), ErasureConfig())
    assert (u.total, u.smoothed, u.gradient) == (pytest.approx(1.7), pytest.approx(1.7), 0.0)


def test_the_rewards_by_value():
    concise = example("reward_concise_answer.py", "concise")
    completions = ["1+1=2", "2, no, 3", [{"role": "assistant", "content": "2"}], "2"]
    assert concise(completions, ["2", "2", "2", None]) == [0.995, 0.0, 0.999, None]
    score = example("reward_concise_answer.py", "compute_score")
    assert score("", "1+1=2", "2") == {"score": 1.0, "numbers": 3.0}
    assert score("", "so 3", "2") == {"score": 0.0, "numbers": 1.0}


def test_the_four_examples_train_together(tmp_path: Path):
    config = lab_config(
        tmp_path,
        f"objective.name={EXAMPLES / 'objective_reinforce.py'}:Reinforce",
        f"erasure.metric={EXAMPLES / 'metric_max_perturbation.py'}:max_perturbation",
        f"rollout.engine={EXAMPLES / 'engine_dynamic_cache.py'}:DynamicCacheEngine",
        f"rewards.functions=['lab', '{EXAMPLES / 'reward_concise_answer.py'}:concise']",
        "erasure.kappa0=0",
    )
    trainer = Trainer(config)
    summary = trainer.train()
    records = read_lines(trainer.run_path / "metrics.jsonl")
    assert summary["method"] == "Reinforce+erase+max_perturbation"
    assert sum(r["erasures"] for r in records) > 0
    assert max(r["mismatch_max"] for r in records) < 1e-4


def test_the_two_engines_give_the_same_rollouts():
    """Whatever the cache, the same draws give the same tokens."""
    from e3rl.config import ErasureConfig, RolloutConfig
    from e3rl.rollout.batches import run_groups
    from e3rl.rollout.group import GroupSettings

    model, rollout = tiny("Qwen3"), RolloutConfig(segment_length=4, max_segments=3, num_generations=3)
    settings: dict[str, Any] = {"eos_ids": EOS, "max_rows": 6, "cache_rows": 6, "max_length": 48}
    prompts = [Prompt(Problem(str(i), str(i)), (5 + i, 7, 9)) for i in range(3)]
    responses = []
    for kind in (example("engine_dynamic_cache.py", "DynamicCacheEngine"), RecomputeEngine):
        drawn = GroupSettings(rollout, ErasureConfig(kappa0=0.0), seed=1, step=1)
        groups = sorted(run_groups(kind(model, **settings), prompts, drawn), key=lambda g: g.prompt.problem.id)
        responses.append([(t.ids.tolist(), len(t.erasures)) for g in groups for t in g.trajectories])
    assert responses[0] == responses[1]
    assert sum(erased for _, erased in responses[0]) > 0
