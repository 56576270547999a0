"""The statistics that a run begins with: those beside its model where thresholds come from them, and what it does without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from e3rl.config import Config
from e3rl.errors import UserError
from e3rl.rollout.moments import Distribution, Moments
from e3rl.rollout.statistics import CalibrationStatistics, measured_by
from e3rl.train.run_directory import run_path
from e3rl.train.trainer import Trainer, first_statistics
from tests.train.random_lab import lab_config, random_lab

USUAL = Distribution.of((3.0, 4.0, 5.0, 6.0))
ON_STATISTICS = ("erasure.baseline=reference", "erasure.kappa0=0.5", "eval.erasable=false")
SINGLE = ("rollout.erase=false", "objective.name=grpo", "eval.num_samples=1")


def _calibrated(tmp_path: Path, *overrides: str) -> Config:
    """A config whose model has statistics beside it that were measured with its settings."""
    model = tmp_path / "calibrated"
    shutil.copytree(random_lab(), model)
    config = lab_config(tmp_path, f"model.path={model}", *overrides)
    CalibrationStatistics(measured_by(config.rollout, config.erasure), (USUAL,), Moments.of((1.0, 2.0))).save(model)
    return config


def test_thresholds_of_training_come_from_the_statistics_beside_the_model(tmp_path: Path):
    trainer = Trainer(_calibrated(tmp_path, *ON_STATISTICS))
    trainer.train()
    [first, *_] = pq.read_table(trainer.run_path / "rollouts" / "step-000001.parquet").to_pylist()
    assert first["segments"][0]["baseline"] == pytest.approx(USUAL.moments.mean + 0.5 * USUAL.moments.std)
    counts = [d.moments.count for d in CalibrationStatistics.load(trainer.run_path / "model").segments]
    assert (
        counts[0] == USUAL.moments.count + 2 * 2 * 2
    )  # and every first candidate of two steps, two prompts, two siblings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (ON_STATISTICS, "training: erasure.baseline = 'reference'.*e3rl calibrate"),
        (SINGLE, r"eval.erasable with eval.num_samples = 1: 1 sample\(s\) of a prompt are fewer.*e3rl calibrate"),
    ],
)
def test_statistics_that_are_missing_are_an_error_before_the_run(tmp_path: Path, settings: tuple[str, ...], words: str):
    config = lab_config(tmp_path, *settings)
    with pytest.raises(UserError, match=words):
        Trainer(config)
    assert not run_path(config).exists()


def test_single_samples_are_evaluated_by_the_statistics_beside_the_model(tmp_path: Path):
    summary = Trainer(_calibrated(tmp_path, *SINGLE)).train()
    assert summary["after"]["erasable"]["samples"] == 1


def test_statistics_of_another_temperature_than_the_evaluations_are_an_error_before_the_run(tmp_path: Path):
    with pytest.raises(UserError, match=r"eval.num_samples = 1: .*rollout.temperature: 1.0 then, 0.5 now"):
        Trainer(_calibrated(tmp_path, *SINGLE, "eval.temperature=0.5"))


def test_training_on_erased_rollouts_adds_only_to_statistics_of_its_own_settings(tmp_path: Path):
    config = _calibrated(tmp_path, "eval.num_samples=1", "rollout.temperature=0.5")
    CalibrationStatistics.load(Path(config.model.path)).check(measured_by(config.rollout, config.erasure))
    with pytest.raises(UserError, match=r"rollout.temperature: 0.5 then, 1.0 now"):
        first_statistics(config, trains=True, evaluates=True)


def test_groups_that_are_their_own_measure_begin_without_statistics(tmp_path: Path):
    config = _calibrated(tmp_path)
    assert first_statistics(config, trains=True, evaluates=True).segments == ()


def test_demonstrations_need_no_statistics(tmp_path: Path):
    config = lab_config(tmp_path, "objective.name=sft", "rollout.num_generations=1", "eval.erasable=false")
    assert first_statistics(config, trains=False, evaluates=True).segments == ()


def test_a_model_that_was_trained_plainly_claims_no_statistics(tmp_path: Path):
    trainer = Trainer(lab_config(tmp_path, "rollout.erase=false", "objective.name=grpo"))
    trainer.train()
    assert not (trainer.run_path / "model" / "e3rl_reference.json").exists()
    assert "statistics that `e3rl calibrate` makes" in (trainer.run_path / "model" / "README.md").read_text()
