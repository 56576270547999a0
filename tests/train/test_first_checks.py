"""What can be wrong is found before the weights are loaded, and a stop is acknowledged when it is asked for."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from e3rl.config import Config, DataConfig, ModelConfig, RewardsConfig, RolloutConfig, RunConfig, TrainConfig
from e3rl.errors import UserError
from e3rl.report.trackers import _logged
from e3rl.train import trainer as module
from e3rl.train.listeners import Silent, StopRequest
from e3rl.train.optimizer import learning_rate
from e3rl.train.summary import model_card
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


def test_a_sample_is_shown_every_n_steps_and_a_finished_run_says_what_goes_on(config: Config):
    heard: list[str] = []

    class Heard(Silent):
        def noted(self, text: str) -> None:
            heard.append(text)

    def shortest(completions: list[str], **_: object) -> list[float]:
        return [0.25 for _ in completions]

    config = replace(config, train=replace(config.train, steps=3, show_steps=2, save_steps=0))
    Trainer(config, reward_functions=[shortest], listeners=[Heard()]).train()
    (sample,) = (text for text in heard if text.startswith("sample: "))
    assert "+1:\n      → " in sample
    assert "reward 0.25" in sample
    assert not any("done already" in text for text in heard)
    Trainer(config, reward_functions=[shortest], listeners=[Heard()], resume=True).train()
    assert "all 3 steps are done already; train.steps=N goes on to step N" in heard


def test_an_adapter_given_as_a_model_names_the_merged_one_beside_it(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    adapter, merged = tmp_path / "adapter", tmp_path / "model"
    for directory, name in ((adapter, "adapter_config.json"), (merged, "config.json")):
        directory.mkdir()
        (directory / name).write_text("{}")
    message = _refusal(replace(config, model=replace(config.model, path=str(adapter))), monkeypatch)
    assert "holds an adapter" in message
    assert message.endswith(f"Did you mean {merged}?")


def test_a_stop_is_acknowledged_at_once(capfd: pytest.CaptureFixture[str]):
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        assert "stopping as soon as the state is whole; again to stop now" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_overlong_training_prompts_are_left_out_on_request(config: Config):
    rows = [("1:", "1"), ("22222222:", "2"), ("3:", "3")]
    path = Path(config.data.train)
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in rows))
    data = replace(config.data, max_prompt_length=8, filter_overlong_prompts=True)
    trainer = Trainer(replace(config, data=data))
    assert [p.problem.prompt for p in trainer.run.data.train] == ["1:", "3:"]
    assert trainer.run.data.left_out == 1
    trainer.run.rollouts.close()


def test_warm_up_is_counted_in_updates_or_as_a_share():
    rates = [learning_rate(TrainConfig(learning_rate=1.0, warmup_steps=4), update, 100) for update in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(TrainConfig(learning_rate=1.0, warmup_ratio=0.1), 0, 20) == 0.5


def test_steps_are_logged_under_the_usual_names_too():
    logged = _logged(
        {"step": 3, "reward": 0.5, "degenerate_groups": 0.25, "finish_ratio": 0.75, "baseline": [1.0, None]}
    )
    assert logged == {
        "train/step": 3.0, "train/reward": 0.5, "train/degenerate_groups": 0.25, "train/finish_ratio": 0.75,
        "train/baseline/0": 1.0, "train/frac_reward_zero_std": 0.25, "train/completions/clipped_ratio": 0.25,
    }  # fmt: skip


def test_names_that_dashboards_for_trl_know():
    ours = {
        "reward_std": 1.0, "length_min": 2.0, "length_max": 3.0, "length": 4.0, "clip_low": 5.0, "clip_high": 6.0,
        "clip_fraction": 7.0, "rewards/math/mean": 8.0, "kl": 9.0, "entropy": 10.0,
    }  # fmt: skip
    logged = _logged(ours)
    usual = (
        "reward_std completions/min_length completions/max_length completions/mean_length clip_ratio/low_mean "
        "clip_ratio/high_mean clip_ratio/region_mean rewards/math/mean kl entropy"
    )
    assert [logged[f"train/{name}"] for name in usual.split()] == list(ours.values())


def test_a_model_card_names_the_base_model_where_it_is_on_a_hub(config: Config, tmp_path: Path):
    summary = {"method": "GRPO", "steps": 1, "tokens_generated": 1, "train_seconds": 1.0, "before": {}, "after": {}}
    for path, named in (("owner/name", True), ("lab", False), (str(tmp_path), False)):
        card = model_card(replace(config, model=ModelConfig(path=path)), summary, has_statistics=False)
        assert (f"\nbase_model: {path}\n" in card) == named
