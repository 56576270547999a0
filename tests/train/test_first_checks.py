"""What can be wrong is found before the weights are loaded, and a stop is acknowledged when it is asked for."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from e3rl.config import Config, DataConfig, ModelConfig, RewardsConfig, RolloutConfig, RunConfig, TrainConfig
from e3rl.errors import UserError
from e3rl.train import trainer as module
from e3rl.train.listeners import StopRequest
from e3rl.train.trainer import Trainer, checkpoint_size


@pytest.fixture
def config(tmp_path: Path) -> Config:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+1:", "target": str(i + 1)}) + "\n" for i in range(4)))
    return Config(
        run=RunConfig(output_dir=str(tmp_path / "runs")),
        model=ModelConfig(device="cpu"),
        data=DataConfig(train=str(data)),
        rollout=RolloutConfig(num_generations=2, segment_length=4, max_segments=2),
        train=TrainConfig(steps=1, prompts_per_step=2),
    )


def _refusal(config: Config, monkeypatch: pytest.MonkeyPatch) -> str:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the weights were loaded first")

    monkeypatch.setattr(module, "load_policy", load)
    with pytest.raises(UserError) as caught:
        Trainer(config)
    return str(caught.value)


def test_math_without_answers_is_refused_with_the_columns(config: Config, monkeypatch: pytest.MonkeyPatch):
    message = _refusal(config, monkeypatch)
    assert "reward 'math' compares with an answer" in message
    assert message.endswith("Its other columns: target")


def test_a_reward_s_missing_column_and_its_line_are_named(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    file = tmp_path / "mine.py"
    file.write_text(
        "def lacks(completions, gold):\n    return [0.0]\n\n"
        "def fails(completions, **columns):\n    return [columns['gold'][0]]\n"
    )
    for name, words in (("lacks", "gold"), ("fails", "raised KeyError: 'gold' (mine.py:5)")):
        message = _refusal(replace(config, rewards=RewardsConfig(functions=(f"{file}:{name}",))), monkeypatch)
        assert words in message


def test_data_that_are_too_few_or_too_long_come_before_the_weights(config: Config, monkeypatch: pytest.MonkeyPatch):
    config = replace(config, data=replace(config.data, answer_column="target"))
    few = replace(config, train=replace(config.train, prompts_per_step=5))
    assert "has only 4 problems" in _refusal(few, monkeypatch)
    assert "the limit is 3" in _refusal(replace(config, data=replace(config.data, max_prompt_length=3)), monkeypatch)


def test_the_size_of_a_checkpoint_is_said_where_it_is_large(config: Config, monkeypatch: pytest.MonkeyPatch):
    trainer = Trainer(replace(config, data=replace(config.data, answer_column="target")))
    assert checkpoint_size(trainer.run) == ""
    numbers = sum(p.numel() for _, p in trainer.policy.trainable())
    monkeypatch.setattr(module, "_CHECKPOINT_BYTES", 3 * 2**30 / numbers)
    assert checkpoint_size(trainer.run).startswith("a checkpoint takes about 3.0 GiB")
    assert "2 are kept, 6.0 GiB" in checkpoint_size(trainer.run)
    trainer.run.rollouts.close()


def test_a_stop_is_acknowledged_at_once(capfd: pytest.CaptureFixture[str]):
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        assert "stopping as soon as the state is whole; again to stop now" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
