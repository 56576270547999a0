"""Plug-ins of all four kinds: the run refuses what does not import or breaks its contract, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from e3rl.cli import main
from e3rl.errors import UserError
from e3rl.train.run_directory import read_lines
from e3rl.train.trainer import Trainer
from tests.train.random_lab import lab_config

SETTING = {
    "objective": "objective.name={}",
    "metric": "erasure.metric={}",
    "engine": "rollout.engine={}",
    "reward": "rewards.functions=['{}']",
}
GOOD = {
    "objective": """
from e3rl.objectives.grpo import GRPO as Mine
""",
    "metric": """
from e3rl.rollout.metric import single_term
def Mine(candidate, history, reference, config):
    return single_term(max(candidate.perturbations))
""",
    "engine": """
from e3rl.engine.recompute import RecomputeEngine
class Mine(RecomputeEngine):
    pass
""",
    "reward": """
def Mine(completions, answer):
    return [float(str(a) in str(c)) for c, a in zip(completions, answer)]
""",
}
BROKEN = [
    *((kind, "raise OSError('gone')", r"can't be imported: OSError: gone") for kind in SETTING),
    *((kind, "Other = 1", r"has no 'Mine'") for kind in SETTING),
    ("objective", GOOD["objective"] + "Mine = 3", "objective '.*' breaks its contract: it must be a class"),
    ("metric", GOOD["metric"].replace("max(", "-max("), "uncertainty metric '.*' breaks its contract: U is -"),
    ("metric", GOOD["metric"].replace(", config", ""), "uncertainty metric '.*' breaks its contract: .*TypeError"),
    ("reward", GOOD["reward"].replace("answer)", "proof)"), "reward '.*' breaks its contract: it raised .*proof"),
    ("reward", GOOD["reward"].replace("return [", "return 0 and ["), "reward '.*' breaks its contract: it returned int"),
    ("reward", "Mine = 3", "reward '.*' is int, not a function"),
    ("engine", "Mine = 3", "engine '.*' breaks its contract: it can't be built: .*int"),
    ("engine", GOOD["engine"].replace("pass", "rollback = None"), "engine '.*' breaks its contract: .*no method `rollback`"),
    (
        "engine",
        GOOD["engine"].replace("pass", "def rollback(self, row, length): ..."),
        "engine '.*' breaks its contract: after `rollback` to 0 the row still holds 3 tokens",
    ),
    (
        "engine",
        GOOD["engine"].replace("pass", "def poll(self):\n        return [(r, c.ids.tolist()) for r, c in super().poll()]"),
        "engine '.*' breaks its contract: `poll` must deliver a Candidate, and delivered a list",
    ),
    (
        "engine",
        GOOD["engine"].replace("pass", "def release(self, row): ..."),
        "engine '.*' breaks its contract: all rows were released, and 30 of 32 are free",
    ),
]  # fmt: skip


def plug_in(directory: Path, kind: str, body: str) -> str:
    path = directory / "mine.py"
    path.write_text(body)
    return SETTING[kind].format(f"{path}:Mine")


@pytest.mark.parametrize(("kind", "body", "words"), BROKEN, ids=[f"{k}: {w}" for k, _, w in BROKEN])
def test_a_broken_plug_in_stops_the_run_before_it_starts(tmp_path: Path, kind: str, body: str, words: str):
    with pytest.raises(UserError, match=words) as caught:
        Trainer(lab_config(tmp_path, plug_in(tmp_path, kind, body)))
    assert "mine.py:Mine" in str(caught.value) or "mine.py" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", SETTING)
def test_the_command_line_says_it_in_one_sentence(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]):
    lab_config(tmp_path)
    setting = plug_in(tmp_path, kind, "raise OSError('gone')")
    from tests.train.random_lab import random_lab

    assert main(["train", str(tmp_path / "recipe.toml"), f"run.output_dir={tmp_path}",
                 f"model.path={random_lab()}", setting]) == 2  # fmt: skip
    error = capsys.readouterr().err
    assert "can't be imported: OSError: gone" in error
    assert "Traceback" not in error


def test_plug_ins_of_all_four_kinds_train_together(tmp_path: Path):
    settings = []
    for kind, body in GOOD.items():
        (tmp_path / kind).mkdir()
        settings.append(plug_in(tmp_path / kind, kind, body))
    trainer = Trainer(lab_config(tmp_path, "erasure.kappa0=0", "train.steps=1", *settings))
    trainer.train()
    [record] = read_lines(trainer.run_path / "metrics.jsonl")
    assert record["erasures"] > 0
    assert record["reward_missing"] == 0
    assert (trainer.run_path / "model" / "e3rl_reference.json").read_text().count("mine.py:Mine") == 1
